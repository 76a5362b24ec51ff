use super::*;
use std::fs::OpenOptions;
use std::path::Path;

fn disk(more: &str) -> Disk {
    let text = format!(
        "<domain type='qemu'><name>d</name><memory>1</memory><devices><disk type='file'><source file='/shown'/>\
         <target dev='vdb' bus='virtio'/>{more}</disk></devices></domain>"
    );
    DomainDef::parse(&text).unwrap().devices.disks.remove(0)
}

fn given(path: &Path, write: bool) -> GivenFile {
    GivenFile::new(OpenOptions::new().read(true).write(write).open(path).unwrap().into(), drop)
}

fn refusal(disk: &Disk, image: &GivenFile) -> String {
    match judged(disk, image) {
        Err(DriverError::Argument(why) | DriverError::Refused(why)) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_given_is_judged_by_its_descriptor() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    std::fs::write(&raw, [0; 4096]).unwrap();
    assert!(judged(&disk(""), &given(&raw, true)).unwrap().writable);
    assert!(!judged(&disk("<readonly/>"), &given(&raw, false)).unwrap().writable);
    assert!(judged(&disk("<readonly/>"), &given(&raw, true)).unwrap().writable);
    assert!(refusal(&disk(""), &given(&raw, false)).contains("'vdb' cannot be written to"));
    let path = rustix::fs::open(&raw, OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    assert!(refusal(&disk(""), &GivenFile::new(path, drop)).contains("cannot be read;"));
    assert!(refusal(&disk("<readonly/>"), &given(dir.path(), false)).contains("no regular file"));
    let qcow2 = disk("<driver type='qcow2'/>");
    assert!(refusal(&qcow2, &given(&raw, true)).contains("no qcow2 image"));
    assert!(refusal(&disk("<driver type='vmdk'/>"), &given(&raw, true)).contains("'vmdk'"));

    // Version 3, whose backing file is named behind the fixed part.
    let mut header = b"QFI\xfb\0\0\0\x03".to_vec();
    header.extend(104_u64.to_be_bytes());
    header.extend(4_u32.to_be_bytes());
    header.resize(104, 0);
    header.extend(b"base");
    let top = dir.path().join("top");
    std::fs::write(&top, &header).unwrap();
    assert!(refusal(&qcow2, &given(&top, true)).contains("('base')"));
}

/// Locks belong to what a descriptor is a copy of: QEMU would not see those of another QEMU that has the same.
#[test]
fn an_image_is_given_to_one_machine_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("raw");
    std::fs::write(&path, [0; 4096]).unwrap();
    let image = given(&path, true);
    // SAFETY: all zeroes are a value of this plain struct.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    (lock.l_type, lock.l_whence, lock.l_start, lock.l_len) = (libc::F_RDLCK as i16, libc::SEEK_SET as i16, 101, 1);
    let number = std::os::fd::AsRawFd::as_raw_fd(&image.as_fd());
    // SAFETY: the descriptor is open, and the struct lives as long as the call.
    assert_eq!(unsafe { libc::fcntl(number, libc::F_OFD_SETLK, &lock) }, 0);
    assert!(refusal(&disk(""), &image).contains("open elsewhere"));
    assert!(refusal(&disk("<readonly/>"), &image).contains("open elsewhere"));
    assert!(judged(&disk("<shareable/>"), &image).is_ok());
    // Whoever only reads shares it with others who do.
    (lock.l_type, lock.l_start) = (libc::F_UNLCK as i16, 101);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::fcntl(number, libc::F_OFD_SETLK, &lock) }, 0);
    (lock.l_type, lock.l_start) = (libc::F_RDLCK as i16, 100);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::fcntl(number, libc::F_OFD_SETLK, &lock) }, 0);
    assert!(judged(&disk("<readonly/>"), &image).is_ok());
    assert!(refusal(&disk(""), &image).contains("open elsewhere"));
}

#[test]
fn a_disk_that_runs_says_by_what_qemu_has_its_image() {
    let image = GivenImage::new(true);
    assert_eq!(GivenImage::read(&image.written()), Some(image));
    let mut disk = disk("");
    disk.source.as_mut().unwrap().given = Some(image.written());
    assert_eq!(
        (GivenImage::of(&disk), disk.path(), disk.files().len(), disk.is_empty()),
        (Some(image), None, 0, false)
    );
    let told = json!([{ "fdset-id": 7, "fds": [{ "fd": 3, "opaque": "virtd: disk vdb" }] },
        { "fdset-id": 8, "fds": [{ "fd": 4, "opaque": "virtd: disk vdc" }] }, { "fdset-id": 9, "fds": [{ "fd": 5 }] }]);
    assert_eq!(sets_of(&told, "vdb"), [7]);
}
