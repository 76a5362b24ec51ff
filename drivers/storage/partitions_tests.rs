use super::*;
use std::process::Command;

const MIB: u64 = 1 << 20;

/// A disk in a file, of so many bytes.
fn disk(bytes: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(bytes).unwrap();
    file
}

fn medium(file: &tempfile::NamedTempFile) -> Medium<'_> {
    Medium { file: file.as_file(), sector: 512, sectors: file.as_file().metadata().unwrap().len() / 512 }
}

fn is_there(tool: &str) -> bool {
    let is_there = Command::new(tool).arg("--version").output().is_ok();
    if !is_there {
        eprintln!("SKIPPED: {tool} is not installed");
    }
    is_there
}

/// What the tool says to a disk.
fn told_by_tool(file: &tempfile::NamedTempFile, arguments: &[&str]) -> (bool, String) {
    let done = Command::new("sfdisk").args(arguments).arg(file.path()).output().unwrap();
    let words = [done.stdout, done.stderr].concat();
    (done.status.success(), String::from_utf8_lossy(&words).into_owned())
}

/// A disk that the tool partitions by a script.
fn scripted(bytes: u64, script: &str) -> tempfile::NamedTempFile {
    let (file, input) = (disk(bytes), tempfile::NamedTempFile::new().unwrap());
    std::fs::write(input.path(), script).unwrap();
    let input = File::open(input.path()).unwrap();
    let done =
        Command::new("sfdisk").args(["--quiet", "--wipe", "never"]).arg(file.path()).stdin(input).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    file
}

/// Why its table is refused; nothing if it is not.
fn refusal(format: Format, file: &tempfile::NamedTempFile) -> String {
    Table::read(format, &medium(file)).err().unwrap_or_default()
}

#[test]
fn what_is_free_is_in_whole_units_between_what_is_taken() {
    type Areas = &'static [(u64, u64)];
    let ranges = |all: Areas| all.iter().map(|(from, to)| *from..*to).collect::<Vec<_>>();
    // The usable sectors, those that are taken, and what is free in units of ten.
    let cases: &[((u64, u64), Areas, Areas)] = &[
        ((0, 100), &[], &[(0, 100)]),
        ((3, 99), &[], &[(10, 90)]),
        ((3, 9), &[], &[]),
        ((0, 100), &[(0, 100)], &[]),
        ((0, 100), &[(20, 30)], &[(0, 20), (30, 100)]),
        ((0, 100), &[(21, 29)], &[(0, 20), (30, 100)]),
        ((0, 100), &[(60, 70), (10, 20)], &[(0, 10), (20, 60), (70, 100)]),
        ((0, 100), &[(15, 16), (17, 18)], &[(0, 10), (20, 100)]),
        ((0, 100), &[(10, 50), (20, 30)], &[(0, 10), (50, 100)]),
        ((20, 80), &[(0, 30), (70, 200)], &[(30, 70)]),
    ];
    for (usable, taken, expected) in cases {
        assert_eq!(free(usable.0..usable.1, ranges(taken), 10), ranges(expected), "{usable:?} {taken:?}");
    }
    let areas = ranges(&[(0, 10), (20, 60)]);
    assert_eq!(place(&areas, 10), Some(0..10));
    assert_eq!(place(&areas, 20), Some(20..40));
    assert_eq!(place(&areas, 50), None);
}

#[test]
fn a_table_that_is_made_and_changed_is_sound_for_the_tool() {
    if !is_there("sfdisk") {
        return;
    }
    for format in [Format::Gpt, Format::Dos] {
        let file = disk(64 * MIB);
        let mut table = Table::new(format, &medium(&file)).unwrap();
        table.write_anew(&medium(&file)).unwrap();
        let (sound, said) = told_by_tool(&file, &["--verify"]);
        assert!(sound, "{format:?}: {said}");
        let free = table.free(512, &[]);
        assert_eq!(free[0].start, 2048);
        let area = place(&free, 4096).unwrap();
        table.add(2, &area);
        let second = place(&table.free(512, &[]), 2048).unwrap();
        table.add(1, &second);
        table.write(&medium(&file)).unwrap();
        let (sound, said) = told_by_tool(&file, &["--verify"]);
        assert!(sound && !said.contains("Overlap"), "{format:?}: {said}");
        let (_, said) = told_by_tool(&file, &["--json"]);
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        let all = said["partitiontable"]["partitions"].as_array().unwrap();
        let places: Vec<_> =
            all.iter().map(|one| (one["start"].as_u64().unwrap(), one["size"].as_u64().unwrap())).collect();
        assert_eq!(places, [(6144, 2048), (2048, 4096)], "{format:?}");
        let (read, is_torn) = Table::read(format, &medium(&file)).unwrap();
        assert!(read.partitions() == table.partitions() && !is_torn, "{format:?}");
        if format == Format::Gpt {
            let key = read.partitions()[0].key.to_uppercase();
            assert_eq!(all[0]["uuid"].as_str(), Some(&*key));
        }
        table.resize(1, 4096);
        table.remove(2);
        table.write(&medium(&file)).unwrap();
        let (sound, said) = told_by_tool(&file, &["--verify"]);
        assert!(sound, "{format:?}: {said}");
        let places: Vec<_> = table.partitions().iter().map(|one| (one.number, one.first, one.count)).collect();
        assert_eq!(places, [(1, 6144, 4096)]);
    }
}

#[test]
fn where_partitions_may_be_the_table_says_and_the_others_stay_as_they_are() {
    if !is_there("sfdisk") {
        return;
    }
    let file = scripted(
        64 * MIB,
        "label: gpt\nfirst-lba: 8192\nlast-lba: 100000\ntable-length: 8\nstart=8192, size=4096, type=U, name=\"boot\", attrs=\"RequiredPartition\"\n",
    );
    let (mut table, _) = Table::read(Format::Gpt, &medium(&file)).unwrap();
    assert_eq!((table.usable(), table.most()), (8192..100_001, 8));
    let free = table.free(512, &[]);
    assert_eq!((free.len(), free[0].clone()), (1, 12_288..98_304));
    let dump = |file: &tempfile::NamedTempFile| told_by_tool(file, &["--dump"]).1;
    let first = |dump: String| {
        let is_first = |line: &&str| line.contains("start=        8192") || line.contains("name=\"boot\"");
        dump.lines().find(is_first).map(str::to_owned).unwrap()
    };
    let before = first(dump(&file));
    assert!(
        before.contains("C12A7328-F81F-11D2-BA4B-00A0C93EC93B") && before.contains("RequiredPartition"),
        "{before}"
    );
    table.add(8, &(12_288..14_336));
    table.write(&medium(&file)).unwrap();
    let after = dump(&file);
    for kept in ["first-lba: 8192", "last-lba: 100000", "table-length: 8"] {
        assert!(after.contains(kept), "{after}");
    }
    assert_eq!(first(after), before);
}

#[test]
fn a_table_that_was_cut_off_is_as_before_or_as_after() {
    let file = disk(64 * MIB);
    let mut table = Table::new(Format::Gpt, &medium(&file)).unwrap();
    table.write_anew(&medium(&file)).unwrap();
    let before = table.partitions();
    let sectors = medium(&file).sectors;
    // What is written in that order: entries and header at the beginning, then at the end.
    let pieces = [(2, 32), (1, 1), (sectors - 33, 32), (sectors - 1, 1)];
    let read = |at: &(u64, u64)| medium(&file).read(at.0, at.1).unwrap();
    let old: Vec<_> = pieces.iter().map(read).collect();
    table.add(1, &(2048..4096));
    table.write(&medium(&file)).unwrap();
    let new: Vec<_> = pieces.iter().map(read).collect();
    for written in 0..=pieces.len() {
        for (one, (at, _)) in pieces.iter().enumerate() {
            medium(&file).write(*at, if one < written { &new[one] } else { &old[one] }).unwrap();
        }
        let (found, is_torn) = Table::read(Format::Gpt, &medium(&file)).unwrap();
        let expected = if written < 2 { &before } else { &table.partitions() };
        assert_eq!((&found.partitions(), is_torn), (expected, !matches!(written, 0 | 4)), "{written}");
        found.write(&medium(&file)).unwrap();
        let (again, is_torn) = Table::read(Format::Gpt, &medium(&file)).unwrap();
        assert!(again.partitions() == *expected && !is_torn, "{written}");
    }
    for at in [1, sectors - 1] {
        medium(&file).write(at, &[0; 512]).unwrap();
    }
    assert!(refusal(Format::Gpt, &file).contains("both of its partition tables (gpt) are broken"));
}

#[test]
fn what_is_no_table_that_can_be_kept_is_refused_by_name() {
    let file = disk(64 * MIB);
    let write = |at: u64, bytes: &[u8]| medium(&file).write(at, bytes).unwrap();
    assert!(refusal(Format::Gpt, &file).contains("build the pool first"));
    assert!(refusal(Format::Dos, &file).contains("build the pool first"));
    // One byte after the other: a sign that it boots, and partitions that overlap, hold others, or are beyond the end.
    let mut sector = vec![0; 512];
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    write(0, &sector);
    assert!(refusal(Format::Dos, &file).contains("boots, and is no partition table"));
    sector[440] = 1;
    let entry = |number: usize, flag: u8, kind: u8, first: u32, count: u32, sector: &mut [u8]| {
        let to = &mut sector[430 + number * 16..][..16];
        (to[0], to[4]) = (flag, kind);
        to[8..12].copy_from_slice(&first.to_le_bytes());
        to[12..].copy_from_slice(&count.to_le_bytes());
    };
    for (entries, why) in [
        (&[(1, 0, 0x83, 2048, 4096), (2, 0, 0x07, 6143, 10)][..], "partitions 1 and 2 overlap"),
        (&[(1, 0, 0x05, 2048, 4096)], "is an extended one"),
        (&[(1, 0, 0x0f, 2048, 4096)], "is an extended one"),
        (&[(1, 0, 0x83, 2048, 1 << 30)], "is not on the disk"),
        (&[(1, 0, 0x83, 0, 10)], "is not on the disk"),
        (&[(1, 0, 0, 2048, 10)], "is not on the disk"),
        (&[(1, 0x41, 0x83, 2048, 10)], "says of itself what cannot be"),
        (&[(1, 0, 0xee, 1, 10)], "protects a partition table of another format"),
        (&[(2, 0, 0xee, 1, 10)], "protects a partition table of another format"),
        (&[(1, 0x80, 0x83, 2048, 10)], ""),
    ] {
        let mut sector = sector.clone();
        entries
            .iter()
            .for_each(|(number, flag, kind, first, count)| entry(*number, *flag, *kind, *first, *count, &mut sector));
        write(0, &sector);
        let found = refusal(Format::Dos, &file);
        assert!(found.contains(why) && found.is_empty() == why.is_empty(), "{why}: {found}");
    }
    let mut table = Table::new(Format::Gpt, &medium(&file)).unwrap();
    table.write_anew(&medium(&file)).unwrap();
    let mut hybrid = medium(&file).read(0, 1).unwrap();
    entry(2, 0, 0x83, 2048, 10, &mut hybrid);
    write(0, &hybrid);
    assert!(refusal(Format::Gpt, &file).contains("a hybrid"));
    for (area, other, why) in [
        (2048..4096, 4095..6000, "overlap"),
        (2048..4096, 3..10, "not where its table says"),
        (2048..4096, 6000..(1 << 40), "not where its table says"),
    ] {
        table.add(1, &area);
        table.add(2, &other);
        table.write_anew(&medium(&file)).unwrap();
        let found = refusal(Format::Gpt, &file);
        assert!(found.contains(why), "{why}: {found}");
    }
    // As if the disk had grown.
    table.remove(2);
    table.write_anew(&medium(&file)).unwrap();
    file.as_file().set_len(128 * MIB).unwrap();
    assert!(refusal(Format::Gpt, &file).contains("as if it had grown"));
}

#[test]
fn what_a_stranger_wrote_for_a_table_is_read_without_a_fall() {
    let file = disk(4 * MIB);
    Table::new(Format::Gpt, &medium(&file)).unwrap().write_anew(&medium(&file)).unwrap();
    let sectors = medium(&file).sectors;
    let mut seed = 1_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..2000 {
        let at = [0, 1, 2, sectors - 1, sectors - 2][random() as usize % 5];
        let kept = medium(&file).read(at, 1).unwrap();
        let mut bytes = kept.clone();
        for _ in 0..=random() % 4 {
            bytes[random() as usize % 512] = random() as u8;
        }
        medium(&file).write(at, &bytes).unwrap();
        for format in [Format::Gpt, Format::Dos] {
            if let Ok((table, _)) = Table::read(format, &medium(&file)) {
                let _ = table.free(512, &[]);
            }
        }
        medium(&file).write(at, &kept).unwrap();
    }
}
