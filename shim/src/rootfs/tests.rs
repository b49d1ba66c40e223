//! Whole root file systems: what containerd hands over, mounted again as the guest does it, and compared with what runc would show.

use std::fs;
use std::os::unix::fs::FileExt;

use tempfile::{NamedTempFile, TempDir};

use super::testing::{Loop, Mounted, assert_same, content, fill, run, see, set_xattr};
use super::*;
use crate::testing::alone;

/// A host: containerd's snapshots, and the configuration of a shim.
struct Host {
    directory: TempDir,
    config: Config,
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config = Config {
            cache_dir: directory.path().join("cache"),
            scratch_dir: directory.path().join("scratch"),
            scratch_size_mib: 1000,
            ..Default::default()
        };
        Self { directory, config }
    }

    /// Makes a snapshot's directory.
    fn snapshot(&self, number: u32) -> PathBuf {
        let path = format!("containerd/snapshots/{number}/fs");
        let path = self.directory.path().join(path);
        fs::create_dir_all(&path).unwrap();
        path
    }

    async fn prepare(&self, mounts: Vec<Mount>) -> Result<Rootfs, Error> {
        prepare(
            &self.config,
            "a-container-with-a-long-name",
            mounts,
            Binds::default(),
        )
        .await
    }
}

fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        type_: kind.into(),
        source: source.into(),
        options: options.iter().map(|&option| option.into()).collect(),
        ..Default::default()
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn overlay(lower: &[&PathBuf], upper: Option<&PathBuf>) -> Mount {
    let lower: Vec<_> = lower.iter().map(|lower| path(lower)).collect();
    let mut options = vec!["index=off".into(), format!("lowerdir={}", lower.join(":"))];
    if let Some(upper) = upper {
        options.push(format!("upperdir={}", path(upper)));
        options.push("workdir=/unused".into());
    }
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    mount("overlay", "overlay", &options)
}

/// The partitions of a disk, mounted; or the whole disk. The files stay with the mounts.
fn mount_all(disk: &DiskFiles) -> (Vec<Mounted>, NamedTempFile) {
    let bytes = content(disk);
    let file = NamedTempFile::new().unwrap();
    file.as_file().write_all_at(&bytes, 0).unwrap();
    let list = match bytes.starts_with(&[0; 446]) && bytes[510..512] == [0x55, 0xaa] {
        true => run(
            "partx",
            &[
                "--raw",
                "--noheadings",
                "--output",
                "START,SECTORS",
                path(file.path()),
            ],
        ),
        false => format!("0 {}", bytes.len() / 512),
    };
    let mounted = list.lines().map(|line| {
        let (start, sectors) = line.split_once(' ').unwrap();
        let in_bytes = |sectors: &str| sectors.parse::<u64>().unwrap() * 512;
        let (offset, limit) = (in_bytes(start), in_bytes(sectors));
        let options = format!("loop,ro,offset={offset},sizelimit={limit}");
        Mounted::new("erofs", &options, path(file.path()))
    });
    (mounted.collect(), file)
}

#[tokio::test]
async fn the_layers_of_an_overlay_show_what_they_show_under_runc() {
    if !alone() {
        return;
    }
    let host = Host::new();
    let (base, changes, upper) = (host.snapshot(1), host.snapshot(2), host.snapshot(3));
    fill(&base);
    // What containerd makes of a layer that deletes a file, replaces one, and replaces a directory.
    run("mknod", &[path(&changes.join("null")), "c", "0", "0"]);
    fs::write(changes.join("size-2048"), "replaced").unwrap();
    fs::create_dir(changes.join("many")).unwrap();
    fs::write(changes.join("many/only"), "one").unwrap();
    set_xattr(&changes.join("many"), "trusted.overlay.opaque", b"y");
    let mounts = vec![overlay(&[&changes, &base], Some(&upper))];
    let (disks, mounts) = host.prepare(mounts).await.unwrap().into_parts();

    assert_eq!(disks.len(), 1);
    assert_eq!(disks[0].id, "a-container-with-a-l");
    let guest = mounts.at(&[7]);
    let told: Vec<_> = guest
        .iter()
        .map(|mount| {
            (
                mount.type_.as_str(),
                mount.source.as_str(),
                mount.options.join(","),
            )
        })
        .collect();
    let ro = "ro".to_owned();
    assert_eq!(
        told,
        [
            ("erofs", "pci:7/1", ro.clone()),
            ("erofs", "pci:7/2", ro),
            ("overlay", "overlay", "index=off".into())
        ]
    );

    let (layers, _file) = mount_all(&disks[0]);
    let [top, bottom] = layers.as_slice() else {
        panic!("{} partitions", layers.len());
    };
    let join = |top: &Path, bottom: &Path| {
        let options = format!("lowerdir={}:{}", path(top), path(bottom));
        Mounted::new("overlay", &options, "overlay")
    };
    let in_guest = join(top.path(), bottom.path());
    let under_runc = join(&changes, &base);
    let seen = see(in_guest.path());
    assert!(!seen.contains_key(Path::new("null")) && seen.contains_key(Path::new("many/only")));
    assert!(!seen.contains_key(Path::new("many/linked")));
    assert_same(under_runc.path(), in_guest.path());
}

#[tokio::test]
async fn an_upper_directory_counts_when_something_is_in_it() {
    if !alone() {
        return;
    }
    let host = Host::new();
    let (base, upper) = (host.snapshot(1), host.snapshot(2));
    fs::write(base.join("file"), "base").unwrap();
    let list = vec![overlay(&[&base], Some(&upper))];
    let (disks, mounts) = host.prepare(list.clone()).await.unwrap().into_parts();
    assert_eq!(disks[0].extents.len(), 1);
    assert_eq!(mounts.at(&[4])[0].source, "pci:4");
    fs::write(upper.join("file"), "from an earlier run").unwrap();
    let (disks, mounts) = host.prepare(list).await.unwrap().into_parts();
    assert_eq!(mounts.at(&[4]).len(), 3);
    let (layers, _file) = mount_all(&disks[0]);
    let read = |layer: &Mounted| fs::read_to_string(layer.path().join("file")).unwrap();
    assert_eq!(
        layers.iter().map(read).collect::<Vec<_>>(),
        ["from an earlier run", "base"]
    );
    assert_eq!(fs::read_dir(&host.config.cache_dir).unwrap().count(), 1);
}

#[tokio::test]
async fn a_directory_is_a_root_file_system() {
    if !alone() {
        return;
    }
    let host = Host::new();
    let directory = host.directory.path().join("rootfs");
    fs::create_dir(&directory).unwrap();
    let writable = vec![mount("bind", path(&directory), &["rbind"])];
    let (disks, mounts) = host.prepare(writable.clone()).await.unwrap().into_parts();
    assert!(disks.is_empty());
    assert_eq!(mounts.at(&[]), [mount("overlay", "overlay", &[])]);
    fs::write(directory.join("file"), "content").unwrap();
    let (disks, mounts) = host.prepare(writable).await.unwrap().into_parts();
    let erofs = mount("erofs", "pci:3", &["ro"]);
    assert_eq!(
        mounts.at(&[3]),
        [erofs.clone(), mount("overlay", "overlay", &[])]
    );
    let (layers, _file) = mount_all(&disks[0]);
    assert_same(&directory, layers[0].path());
    let view = vec![mount("bind", path(&host.snapshot(1)), &["ro", "rbind"])];
    let (_, mounts) = host.prepare(view).await.unwrap().into_parts();
    assert_eq!(mounts.at(&[3]), [erofs]);
}

#[tokio::test]
async fn erofs_images_are_attached_as_they_are() {
    if !alone() {
        return;
    }
    let host = Host::new();
    let images = [1, 2].map(|number| {
        let directory = host.snapshot(number);
        fs::write(directory.join("layer"), number.to_string()).unwrap();
        let image = directory.parent().unwrap().join("layer.erofs");
        run("mkfs.erofs", &["--quiet", path(&image), path(&directory)]);
        image
    });
    let erofs = |image: &Path| mount("erofs", path(image), &["ro", "loop"]);
    let over = ["upperdir=/absent", "lowerdir={{ overlay 0 1 }}"];
    fs::create_dir(host.directory.path().join("upper")).unwrap();
    let upper = format!("upperdir={}", path(&host.directory.path().join("upper")));
    let list = vec![
        erofs(&images[1]),
        erofs(&images[0]),
        mount("format/mkdir/overlay", "overlay", &[&upper, over[1]]),
    ];
    let check = |disks: &[DiskFiles]| {
        let (layers, _file) = mount_all(&disks[0]);
        let read = |layer: &Mounted| fs::read_to_string(layer.path().join("layer")).unwrap();
        assert_eq!(layers.iter().map(read).collect::<Vec<_>>(), ["2", "1"]);
    };
    check(&host.prepare(list.clone()).await.unwrap().into_parts().0);
    let missing = vec![
        list[0].clone(),
        list[1].clone(),
        mount("overlay", "", &over),
    ];
    let error = host.prepare(missing).await.unwrap_err();
    assert!(
        matches!(&error, Error::Missing(path) if path == Path::new("/absent")),
        "{error}"
    );

    // Containerd 2.1 mounts them itself, over the snapshots' directories.
    let (one, two) = (host.snapshot(1), host.snapshot(2));
    let _mounted = [(&one, &images[0]), (&two, &images[1])]
        .map(|(directory, image)| Mounted::over("erofs", "loop,ro", path(image), directory));
    let (disks, _) = host
        .prepare(vec![overlay(&[&two, &one], None)])
        .await
        .unwrap()
        .into_parts();
    check(&disks);
    assert_eq!(fs::read_dir(&host.config.cache_dir).unwrap().count(), 0);
}

#[tokio::test]
async fn a_block_device_is_attached_as_it_is() {
    let host = Host::new();
    let file = host.directory.path().join("file");
    fs::write(&file, vec![0; 8 << 20]).unwrap();
    run("mke2fs", &["-q", path(&file)]);
    let device = Loop::new(&file);
    let thin = vec![mount("ext4", path(device.path()), &["discard"])];
    let (disks, mounts) = host.prepare(thin).await.unwrap().into_parts();
    assert!(!disks[0].read_only);
    assert_eq!(disks[0].extents[0].1.length, 8 << 20);
    assert_eq!(mounts.at(&[2]), [mount("ext4", "pci:2", &["discard"])]);
    drop(disks);
    drop(device);
    let view = vec![mount("ext4", path(&file), &["ro", "loop"])];
    let (disks, mounts) = host.prepare(view).await.unwrap().into_parts();
    assert!(disks[0].read_only);
    assert_eq!(mounts.at(&[2]), [mount("ext4", "pci:2", &["ro"])]);
}

#[tokio::test]
async fn what_is_gone_is_named() {
    let host = Host::new();
    let (there, gone) = (host.snapshot(1), host.directory.path().join("gone"));
    for mounts in [
        overlay(&[&there, &gone], None),
        overlay(&[&there], Some(&gone)),
        mount("bind", path(&gone), &["rbind"]),
        mount("ext4", path(&gone), &[]),
        mount("erofs", path(&gone), &["ro", "loop"]),
    ] {
        let error = host.prepare(vec![mounts]).await.unwrap_err();
        assert!(
            matches!(&error, Error::Missing(path) if *path == gone),
            "{error}"
        );
    }
}

#[tokio::test]
async fn as_many_layers_as_an_image_can_have_become_one_disk() {
    let host = Host::new();
    let layers: Vec<_> = (1..=127)
        .map(|number| {
            let layer = host.snapshot(number);
            fs::write(layer.join(format!("file-{number}")), "content").unwrap();
            layer
        })
        .collect();
    let lower: Vec<_> = layers.iter().collect();
    let (disks, mounts) = host
        .prepare(vec![overlay(&lower, None)])
        .await
        .unwrap()
        .into_parts();
    assert_eq!(disks[0].extents.len(), 129);
    let mounts = mounts.at(&[5]);
    assert_eq!(mounts[126], mount("erofs", "pci:5/127", &["ro"]));
    assert_eq!(
        mounts[127],
        mount("overlay", "overlay", &["index=off", "ro"])
    );
}
