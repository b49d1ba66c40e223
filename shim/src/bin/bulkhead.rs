//! `bulkhead`: the command-line tool.

fn main() {}
