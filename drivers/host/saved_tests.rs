use super::*;
use crate::host::look::Look;

fn telling() -> Telling {
    let look = Look { inode: 1234, length: 65536, sample: 0xfeed_beef };
    Telling {
        driver: "qemu".into(),
        version: (7, 2, 9),
        saved_usec: 1_795_403_655_000_000,
        paused: true,
        cpu: None,
        disks: vec![DiskLook { target: "vda".into(), path: "/images/web.qcow2".into(), look }],
    }
}

const CONFIGURATION: &str = "<domain type='qemu'><name>web</name><memory>65536</memory></domain>\n";

/// A file as it is written, with that stream.
fn written(stream: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    let longest = Telling {
        disks: telling().disks.iter().map(|d| DiskLook { look: Look::LONGEST, ..d.clone() }).collect(),
        ..telling()
    };
    let draft = Draft::begin(&mut file, &longest, CONFIGURATION).unwrap();
    let moved = pump::<io::Error>(&mut &*stream, &mut file, |_| Ok(())).unwrap();
    draft.finish(&file, &telling(), CONFIGURATION, moved).unwrap();
    file
}

fn bytes_of(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// The same file with other content.
fn holding(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

/// Reads all of it: what is wrong, if anything is.
fn objection(bytes: &[u8]) -> Option<String> {
    let read = Saved::read(holding(bytes)).and_then(|saved| saved.verify::<Unusable>(|_| Ok(())));
    read.err().map(|e| e.to_string())
}

#[test]
fn what_is_written_is_read_again() {
    let stream: Vec<u8> = (0..3_000_001u32).map(|n| (n % 251) as u8).collect();
    let saved = Saved::read(written(&stream)).unwrap();
    assert_eq!(saved.telling, telling());
    assert_eq!(saved.configuration, CONFIGURATION);
    assert_eq!(saved.length(), stream.len() as u64);
    saved.verify::<Unusable>(|_| Ok(())).unwrap();
    for _ in 0..2 {
        let mut again = Vec::new();
        saved.stream().unwrap().get().unwrap().read_to_end(&mut again).unwrap();
        assert_eq!(again, stream);
    }
}

/// What is written into a pipe, with that stream.
fn tailed(stream: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let nothing_yet = Telling { disks: Vec::new(), ..telling() };
    Draft::announce(&mut bytes, &nothing_yet, CONFIGURATION, false).unwrap();
    let moved = pump::<io::Error>(&mut &*stream, &mut bytes, |_| Ok(())).unwrap();
    write_tail(&mut bytes, &telling().disks, moved).unwrap();
    bytes
}

#[test]
fn what_went_through_a_pipe_says_at_its_end_what_it_is() {
    let whole = tailed(b"a stream");
    let saved = Saved::read(holding(&whole)).unwrap();
    saved.verify::<Unusable>(|_| Ok(())).unwrap();
    assert_eq!((&saved.telling, saved.length()), (&telling(), 8));
    let mut poured = Vec::new();
    saved.pour::<Unusable>(&mut poured, |_| Ok(())).unwrap();
    assert_eq!(poured, b"a stream");
    let stream = whole.len() - TAIL.1 - serde_json::to_vec(&telling().disks).unwrap().len() - 8;
    for at in stream..whole.len() {
        let mut changed = whole.clone();
        changed[at] ^= 0x10;
        assert!(objection(&changed).is_some(), "byte {at}");
        assert!(objection(&whole[..at]).is_some(), "{at} bytes");
    }
    assert!(objection(&[&whole[..], b"more"].concat()).unwrap().contains("its end is missing"));
}

#[test]
fn it_may_begin_anywhere_in_what_a_client_has_given() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"what the client has before").unwrap();
    let base = file.stream_position().unwrap();
    let draft = Draft::begin_at(base, &telling(), CONFIGURATION, true).unwrap();
    file.write_all_at(b"a stream", draft.stream_at()).unwrap();
    let moved = pump::<io::Error>(&mut &b"a stream"[..], &mut io::sink(), |_| Ok(())).unwrap();
    draft.finish(&file, &telling(), CONFIGURATION, moved).unwrap();
    assert!(Saved::read(file.try_clone().unwrap()).is_err());
    let saved = Saved::read_given(file.try_clone().unwrap(), base).unwrap();
    saved.verify::<Unusable>(|_| Ok(())).unwrap();
    assert!(saved.is_packed() && !saved.is_plain());
    // Whoever has it open may change it after that.
    saved.pour::<Unusable>(&mut io::sink(), |_| Ok(())).unwrap();
    file.write_all_at(b"b", saved.stream).unwrap();
    assert!(matches!(saved.pour(&mut io::sink(), |_| Ok(())), Err(Unusable::Wrong(_))));
}

/// The oldest file of the format that there is: whatever is written later, it is read.
#[test]
fn the_oldest_file_is_read() {
    let oldest = include_bytes!("../../tests/data/saved-1.virtsave");
    let saved = Saved::read(holding(oldest)).unwrap();
    saved.verify::<Unusable>(|_| Ok(())).unwrap();
    assert_eq!(saved.telling, telling());
    assert_eq!(saved.configuration, CONFIGURATION);
    let mut stream = String::new();
    saved.stream().unwrap().get().unwrap().read_to_string(&mut stream).unwrap();
    assert_eq!(stream, "QEVM: a stream that no QEMU has written");
    assert_eq!(bytes_of(&written(stream.as_bytes())), oldest, "and it is what is written today");
}

#[test]
fn no_byte_can_be_changed_unnoticed_and_none_is_missed() {
    let whole = bytes_of(&written(b"a stream"));
    assert_eq!(objection(&whole), None);
    let used = HEADER + serde_json::to_vec(&telling()).unwrap().len() + CONFIGURATION.len();
    let stream = whole.len() - b"a stream".len();
    for at in (0..used).chain(stream..whole.len()) {
        let mut changed = whole.clone();
        changed[at] ^= 0x10;
        assert!(objection(&changed).is_some(), "byte {at}");
    }
    for length in [0, 3, 8, 40, HEADER, used, stream, whole.len() - 1] {
        let told = objection(&whole[..length]).unwrap();
        assert!(length < 8 || told.starts_with("it is cut off"), "{length}: {told}");
    }
    let longer = objection(&[&whole[..], b"more"].concat()).unwrap();
    assert!(longer.contains("has been changed"), "{longer}");
}

#[test]
fn what_others_made_is_told_by_name() {
    let told = objection(b"LibvirtQemudSave\x02\0\0\0and more").unwrap();
    assert!(told.contains("libvirt"), "{told}");
    assert!(objection(b"QEVM and more, and more, and more").unwrap().starts_with("it is no machine"));
    let mut newer = bytes_of(&written(b""));
    newer[8] = 2;
    assert_eq!(objection(&newer).unwrap(), "it is of version 2 of the format, and this virtd reads version 1");
}

#[test]
fn a_file_without_a_header_is_none() {
    let mut file = tempfile::tempfile().unwrap();
    let _draft = Draft::begin(&mut file, &telling(), CONFIGURATION).unwrap();
    pump::<io::Error>(&mut &b"a stream"[..], &mut file, |_| Ok(())).unwrap();
    assert!(objection(&bytes_of(&file)).unwrap().contains("never completed"));
}
