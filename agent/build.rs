//! Generates the sandbox service from its definition; pure Rust, no protoc.

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let modules = std::path::Path::new(&out).join("mod.rs");
    Codegen::new()
        .out_dir(&out)
        .inputs(["proto/sandbox.proto"])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default())
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .run()
        .expect("proto/sandbox.proto compiles");
    // The generated files carry inner attributes, so they can only be modules of their own.
    std::fs::write(modules, "pub mod sandbox;\npub mod sandbox_ttrpc;\n")
        .expect("OUT_DIR is writable");
}
