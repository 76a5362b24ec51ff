//! Files lent to a user and given back, on the file system of /var/tmp. Need root.

use super::*;
use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

struct Room {
    dir: tempfile::TempDir,
    user: RunAs,
}

impl Room {
    /// `None` where it cannot be tried.
    fn new() -> Option<Room> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: needs root");
            return None;
        }
        let Ok(user) = RunAs::look_up("nobody", None, &[]) else {
            eprintln!("SKIPPED: no user nobody");
            return None;
        };
        let dir = tempfile::tempdir_in("/var/tmp").ok()?;
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).ok()?;
        let probe = File::create(dir.path().join("probe")).ok()?;
        if Acl::from_mode(0o600).with_user(user.uid, READ).set(&probe).is_err() {
            eprintln!("SKIPPED: no access control lists in /var/tmp");
            return None;
        }
        Some(Room { dir, user })
    }

    fn ledger(&self) -> Ledger {
        Ledger::open(&self.dir.path().join("state")).unwrap()
    }

    fn file(&self, name: &str, mode: u32) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    fn may(&self, path: &Path, write: bool) -> bool {
        {
            let file = Found::resolve(path).unwrap();
            self.user.reach(|| may_open(&file.fd, write)).unwrap()
        }
    }

    fn mode(&self, path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().mode() & 0o777
    }
}

fn read(path: &Path) -> Want {
    Want { path: path.to_owned(), write: false, device: false }
}

fn write(path: &Path) -> Want {
    Want { write: true, ..read(path) }
}

#[test]
fn a_file_is_lent_and_given_back() {
    let Some(room) = Room::new() else { return };
    let (ledger, guest) = (room.ledger(), Uuid::new_v4());
    let (disk, iso) = (room.file("disk", 0o600), room.file("iso", 0o600));
    ledger.lend(&room.user, guest, &[write(&disk), read(&iso)]).unwrap();
    assert!(room.may(&disk, true) && room.may(&iso, false) && !room.may(&iso, true));
    ledger.give_back(guest);
    assert!(!room.may(&disk, false) && !room.may(&iso, false));
    assert_eq!((room.mode(&disk), room.mode(&iso)), (0o600, 0o600));
    assert_eq!(Acl::of(File::open(&disk).unwrap()).unwrap(), Acl::from_mode(0o600));
}

#[test]
fn a_device_is_lent_to_the_guest_that_has_it_to_itself_only() {
    let Some(room) = Room::new() else { return };
    let (ledger, guest, node) = (room.ledger(), Uuid::new_v4(), room.dir.path().join("card"));
    let made = rustix::fs::mknodat(CWD, &node, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, libc::makedev(1, 3));
    if let Err(error) = made {
        return eprintln!("SKIPPED: no device can be made: {error}");
    }
    let refused = ledger.lend(&room.user, guest, &[write(&node)]).unwrap_err().to_string();
    assert!(refused.contains("it is a character device"), "{refused}");
    ledger.lend(&room.user, guest, &[Want { device: true, ..write(&node) }]).unwrap();
    assert!(room.may(&node, true));
    ledger.give_back(guest);
    assert!(!room.may(&node, false));
    assert_eq!(room.mode(&node), 0o600);
}

#[test]
fn what_is_accessible_anyway_is_left_alone() {
    let Some(room) = Room::new() else { return };
    let (ledger, iso) = (room.ledger(), room.file("iso", 0o644));
    ledger.lend(&room.user, Uuid::new_v4(), &[read(&iso), read(Path::new("/dev/null"))]).unwrap();
    assert!(ledger.lock().loans.is_empty());
}

#[test]
fn two_guests_share_a_file() {
    let Some(room) = Room::new() else { return };
    let (ledger, one, two) = (room.ledger(), Uuid::new_v4(), Uuid::new_v4());
    let disk = room.file("disk", 0o640);
    ledger.lend(&room.user, one, &[read(&disk)]).unwrap();
    ledger.lend(&room.user, two, &[write(&disk)]).unwrap();
    assert!(room.may(&disk, true));
    ledger.give_back(two);
    assert!(room.may(&disk, false) && !room.may(&disk, true), "the reader still reads");
    ledger.give_back(one);
    ledger.give_back(one);
    assert!(!room.may(&disk, false));
    assert_eq!(room.mode(&disk), 0o640);
}

#[test]
fn the_next_virtd_gives_back_what_the_last_one_lent() {
    let Some(room) = Room::new() else { return };
    let (guest, disk) = (Uuid::new_v4(), room.file("disk", 0o600));
    room.ledger().lend(&room.user, guest, &[write(&disk)]).unwrap();
    let next = room.ledger();
    assert!(room.may(&disk, true), "a guest may still run");
    next.give_back(guest);
    assert!(!room.may(&disk, false));
}

#[test]
fn a_reboot_of_the_host_gives_everything_back() {
    let Some(room) = Room::new() else { return };
    let disk = room.file("disk", 0o600);
    let ledger = room.ledger();
    ledger.lend(&room.user, Uuid::new_v4(), &[write(&disk)]).unwrap();
    let mut books = ledger.lock();
    books.boot_id = "an earlier one".into();
    ledger.save(&books, false).unwrap();
    drop(books);
    let next = room.ledger();
    let due = next.due();
    assert_eq!(due.iter().map(|due| &due.path).collect::<Vec<_>>(), [&disk]);
    assert!(room.may(&disk, true), "no file is touched when the ledger is opened");
    next.give_back_one(&due[0]).unwrap();
    assert!(next.lock().loans.is_empty() && next.due().is_empty());
    assert!(!room.may(&disk, false));
    assert!(room.ledger().due().is_empty());
}

#[test]
fn what_is_due_and_was_borrowed_anew_stays_lent() {
    let Some(room) = Room::new() else { return };
    let (guest, disk) = (Uuid::new_v4(), room.file("disk", 0o600));
    room.ledger().lend(&room.user, guest, &[write(&disk)]).unwrap();
    let books = room.dir.path().join("state/access.json");
    let text = std::fs::read_to_string(&books).unwrap();
    std::fs::write(&books, text.replace(&boot_id().unwrap(), "an earlier one")).unwrap();
    let ledger = room.ledger();
    let due = ledger.due();
    assert_eq!(due[0].guest, guest);
    ledger.lend(&room.user, guest, &[read(&disk)]).unwrap();
    ledger.give_back_one(&due[0]).unwrap();
    assert!(room.may(&disk, false) && !room.may(&disk, true));
    ledger.give_back(guest);
    assert_eq!(Acl::of(File::open(&disk).unwrap()).unwrap(), Acl::from_mode(0o600));
}

/// A file whose turn somebody has who waits for its file system keeps nobody from theirs.
#[test]
fn a_file_that_does_not_answer_costs_other_files_nothing() {
    let Some(room) = Room::new() else { return };
    let (ledger, guests) = (room.ledger(), [Uuid::new_v4(), Uuid::new_v4()]);
    let (dead, alive) = (room.file("dead", 0o600), room.file("alive", 0o600));
    ledger.lend(&room.user, guests[0], &[write(&dead)]).unwrap();
    let stat = Found::resolve(&dead).unwrap().stat;
    let turn = ledger.turn((stat.st_dev, stat.st_ino));
    let waits = turn.lock().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| ledger.give_back(guests[0]));
        ledger.lend(&room.user, guests[1], &[write(&alive)]).unwrap();
        assert!(room.may(&alive, true));
        ledger.give_back(guests[1]);
        assert!(!room.may(&alive, false));
        drop(waits);
    });
    assert!(!room.may(&dead, false));
    assert!(ledger.lock().loans.is_empty());
}

#[test]
fn what_others_change_meanwhile_remains() {
    let Some(room) = Room::new() else { return };
    let (ledger, guest, disk) = (room.ledger(), Uuid::new_v4(), room.file("disk", 0o600));
    ledger.lend(&room.user, guest, &[write(&disk)]).unwrap();
    let file = File::open(&disk).unwrap();
    Acl::of(&file).unwrap().with_user(4242, READ).set(&file).unwrap();
    ledger.give_back(guest);
    let after = Acl::of(&file).unwrap();
    assert!(after.names(4242) && !after.names(room.user.uid));
}

#[test]
fn a_replaced_file_is_not_touched() {
    let Some(room) = Room::new() else { return };
    let (ledger, guest, disk) = (room.ledger(), Uuid::new_v4(), room.file("disk", 0o600));
    ledger.lend(&room.user, guest, &[write(&disk)]).unwrap();
    std::fs::rename(&disk, room.dir.path().join("moved")).unwrap();
    symlink("/etc/passwd", &disk).unwrap();
    ledger.give_back(guest);
    assert!(ledger.lock().loans.is_empty());
}

#[test]
fn a_closed_directory_is_not_in_the_way_and_without_one_file_nothing_is_lent() {
    let Some(room) = Room::new() else { return };
    let (ledger, guest) = (room.ledger(), Uuid::new_v4());
    let open = room.file("open", 0o600);
    std::fs::create_dir(room.dir.path().join("home")).unwrap();
    let hidden = room.file("home/disk", 0o600);
    std::fs::set_permissions(hidden.parent().unwrap(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let files = ledger.lend(&room.user, guest, &[write(&open), write(&hidden)]).unwrap();
    assert_eq!(files.iter().map(|file| &file.path).collect::<Vec<_>>(), [&open, &hidden]);
    ledger.give_back(guest);
    let missing = room.dir.path().join("missing");
    ledger.lend(&room.user, guest, &[write(&open), write(&hidden), write(&missing)]).unwrap_err();
    assert!(!room.may(&open, false), "all or nothing");
    assert_eq!(room.mode(&hidden), 0o600);
    assert!(ledger.lock().loans.is_empty());
}

#[test]
fn a_missing_file_is_named() {
    let Some(room) = Room::new() else { return };
    let error = room.ledger().lend(&room.user, Uuid::new_v4(), &[read(Path::new("/var/tmp/no/such.img"))]).unwrap_err();
    assert!(error.to_string().starts_with("/var/tmp/no/such.img: No such file"), "{error}");
}

#[test]
fn what_an_images_header_names_is_not_lent() {
    let Some(room) = Room::new() else { return };
    let base = room.file("base", 0o600);
    let (top, split) = (room.dir.path().join("top"), room.dir.path().join("split"));
    let make = |args: &[&str]| {
        let made = std::process::Command::new("qemu-img").args(args).current_dir(room.dir.path()).output();
        made.is_ok_and(|output| output.status.success())
    };
    if !make(&["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top", "1M"])
        || !make(&["create", "-q", "-f", "qcow2", "-o", "data_file=data", "split", "1M"])
    {
        return eprintln!("SKIPPED: qemu-img is not installed");
    }
    let data = room.dir.path().join("data");
    for file in [&top, &split, &data] {
        std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600)).unwrap();
    }
    let (ledger, guest) = (room.ledger(), Uuid::new_v4());
    ledger.lend(&room.user, guest, &[write(&top), write(&split)]).unwrap();
    assert!(room.may(&top, true) && room.may(&split, true));
    assert!(!room.may(&base, false) && !room.may(&data, false));
}

#[test]
fn a_ledger_that_was_cut_off_is_put_aside() {
    let dir = tempfile::tempdir().unwrap();
    for text in ["", "{\"boot_id\":"] {
        std::fs::write(dir.path().join("access.json"), text).unwrap();
        Ledger::open(dir.path()).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("access.broken")).unwrap(), text);
    }
}

#[test]
fn what_is_lent_beside_a_guest_is_each_borrowers_own() {
    let Some(room) = Room::new() else { return };
    let (ledger, guest) = (std::sync::Arc::new(room.ledger()), Uuid::new_v4());
    let (disk, overlay) = (room.file("disk", 0o600), room.file("overlay", 0o600));
    let images =
        crate::host::image::Images::new(crate::host::lender::Lender::To(room.user.clone(), ledger), guest, None);
    let merge = images.lend(&[(disk.clone(), true), (overlay.clone(), true)]).unwrap();
    drop(images.lend(&[(disk.clone(), false)]).unwrap());
    assert!(images.lend(&[(room.dir.path().join("none"), true)]).is_err());
    assert!(room.may(&disk, true) && room.may(&overlay, true), "a look takes a running merge's files away");
    drop(merge);
    assert!(!room.may(&disk, false) && !room.may(&overlay, false));
}

#[test]
fn a_file_renamed_while_it_is_lent_is_given_back() {
    let Some(room) = Room::new() else { return };
    let (guest, disk, moved) = (Uuid::new_v4(), room.file("disk", 0o600), room.dir.path().join("folder/moved"));
    room.ledger().lend(&room.user, guest, &[write(&disk)]).unwrap();
    std::fs::create_dir(moved.parent().unwrap()).unwrap();
    std::fs::rename(&disk, &moved).unwrap();
    std::fs::write(&disk, "another").unwrap();
    assert!(room.may(&moved, true));
    // The next virtd.
    room.ledger().give_back(guest);
    assert!(!room.may(&moved, false), "its entry is gone");
    assert_eq!(Acl::of(File::open(&moved).unwrap()).unwrap(), Acl::from_mode(0o600));
}

#[test]
fn guests_of_different_users_share_a_file() {
    let Some(room) = Room::new() else { return };
    let (ledger, [one, other]) = (room.ledger(), [Uuid::new_v4(), Uuid::new_v4()]);
    let second = Room {
        dir: tempfile::tempdir().unwrap(),
        user: RunAs { uid: 123_456, gid: 123_456, groups: vec![], ..room.user.clone() },
    };
    let base = room.file("base", 0o600);
    ledger.lend(&room.user, one, &[read(&base)]).unwrap();
    ledger.lend(&second.user, other, &[write(&base)]).unwrap();
    assert!(room.may(&base, false) && !room.may(&base, true) && second.may(&base, true));
    ledger.give_back(one);
    assert!(!room.may(&base, false) && second.may(&base, true));
    ledger.give_back(other);
    assert_eq!(Acl::of(File::open(&base).unwrap()).unwrap(), Acl::from_mode(0o600));
}

/// A mask that grew for us is as it was afterwards, however many borrowed the file.
#[test]
fn a_list_with_a_mask_is_as_before_after_two_guests() {
    let Some(room) = Room::new() else { return };
    let (ledger, disk) = (room.ledger(), room.file("disk", 0o640));
    let file = File::open(&disk).unwrap();
    Acl::of(&file).unwrap().with_user(4242, READ).set(&file).unwrap();
    let before = Acl::of(&file).unwrap();
    let other = RunAs { uid: 123_456, gid: 123_456, groups: vec![], ..room.user.clone() };
    let (one, two) = (Uuid::new_v4(), Uuid::new_v4());
    ledger.lend(&room.user, one, &[write(&disk)]).unwrap();
    ledger.lend(&other, two, &[write(&disk)]).unwrap();
    ledger.give_back(one);
    ledger.give_back(two);
    assert_eq!(Acl::of(&file).unwrap(), before);
}

#[test]
fn what_an_earlier_virtd_had_lent_to_the_common_user_is_given_back() {
    let Some(room) = Room::new() else { return };
    let (guest, disk) = (Uuid::new_v4(), room.file("disk", 0o600));
    room.ledger().lend(&room.user, guest, &[write(&disk)]).unwrap();
    let books = room.dir.path().join("state/access.json");
    let mut old: serde_json::Value = serde_json::from_slice(&std::fs::read(&books).unwrap()).unwrap();
    old["loans"][0]["holders"][guest.to_string()] = true.into();
    old["loans"][0].as_object_mut().unwrap().remove("handle");
    std::fs::write(&books, old.to_string()).unwrap();
    let ledger = room.ledger();
    assert!(room.may(&disk, true));
    ledger.give_back(guest);
    assert!(!room.may(&disk, false));
}

#[test]
fn what_stays_lent_under_its_own_name_is_not_looked_at_for_what_is_given_back() {
    let Some(room) = Room::new() else { return };
    let (ledger, guest) = (room.ledger(), Uuid::new_v4());
    let (disk, other, link) = (room.file("disk", 0o600), room.file("other", 0o600), room.dir.path().join("link"));
    symlink(&disk, &link).unwrap();
    ledger.lend(&room.user, guest, &[write(&disk), write(&other)]).unwrap();
    ledger.give_back_these(guest, std::slice::from_ref(&disk), &[other.clone(), link].into());
    assert!(room.may(&disk, true), "it is kept under another name");
    // Whoever looked there would find the first one.
    std::fs::rename(&other, room.dir.path().join("moved")).unwrap();
    symlink(&disk, &other).unwrap();
    ledger.give_back_these(guest, std::slice::from_ref(&disk), &[other].into());
    assert!(!room.may(&disk, false) && room.may(&room.dir.path().join("moved"), true));
    ledger.give_back(guest);
}
