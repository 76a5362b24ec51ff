//! A GUID partition table as it is on a disk: a header and entries behind it at the disk's beginning, and both again at its end. It is
//! read and written here, with all that is not changed byte by byte as it was.
//!
//! ```text
//!  protective MBR │ header │ entries │ partitions … │ entries │ header
//!       0             1        2 …     first … last     …       last sector
//! ```
//!
//! The first is what counts where it is whole: it is written before the second. Who is killed in between leaves a first that is torn,
//! and a second with what was before, or a first with what is new, and a second that is torn or old: it is made whole from the other.

use super::partitions::{Medium, Partition};
use std::io;
use uuid::Uuid;
use virt_model::driver::storage::FileId;

const SIGNATURE: &[u8; 8] = b"EFI PART";
const REVISION: u32 = 0x0001_0000;
/// So long its header is, and so long each entry, where nothing says more.
const HEADER: usize = 92;
const ENTRY: usize = 128;
/// So many entries a new table has, and so many at most one that is read.
const ENTRIES: u32 = 128;
const MOST_ENTRIES: u32 = 1024;
/// The type of partitions that we make: data of Linux.
const LINUX_DATA: Uuid = Uuid::from_u128(0x0fc6_3daf_8483_4772_8e79_3d69_d847_7de4);
/// The type of the one partition of the MBR before it.
const PROTECTIVE: u8 = 0xee;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpt {
    /// The first header, as long as it says of itself.
    header: Vec<u8>,
    entries: Vec<u8>,
    /// Where the entries at the end are.
    second_entries: u64,
}

/// One of the two, as it is found.
struct Half {
    header: Vec<u8>,
    entries: Vec<u8>,
}

impl Gpt {
    /// An empty one for such a disk. Error: it is too small.
    pub fn new(medium: &Medium) -> Result<Gpt, String> {
        let entries = vec![0; ENTRIES as usize * ENTRY];
        let length = medium.sectors_of(entries.len());
        let too_small = || "it is too small for a partition table".to_owned();
        let end = medium.sectors.checked_sub(length + 1).filter(|end| *end > 2 + length).ok_or_else(too_small)?;
        let mut header = vec![0; HEADER];
        header[..8].copy_from_slice(SIGNATURE);
        put(&mut header, 8, &REVISION.to_le_bytes());
        put(&mut header, 12, &(HEADER as u32).to_le_bytes());
        put(&mut header, 24, &1_u64.to_le_bytes());
        put(&mut header, 32, &(medium.sectors - 1).to_le_bytes());
        put(&mut header, 40, &(2 + length).to_le_bytes());
        put(&mut header, 48, &(end - 1).to_le_bytes());
        put(&mut header, 56, &Uuid::new_v4().to_bytes_le());
        put(&mut header, 72, &2_u64.to_le_bytes());
        put(&mut header, 80, &ENTRIES.to_le_bytes());
        put(&mut header, 84, &(ENTRY as u32).to_le_bytes());
        Ok(Gpt { header, entries, second_entries: end })
    }

    /// The table of a disk, and whether one half of it is to be made whole. Error: a sentence's end; it is none that we can keep.
    pub fn read(medium: &Medium) -> Result<(Gpt, bool), String> {
        let first_sector = medium.read(0, 1).map_err(|e| format!("cannot be read: {e}"))?;
        refuse_other_mbr(&first_sector)?;
        let end = medium.sectors - 1;
        let (first, second) = (Half::at(medium, 1), Half::at(medium, end));
        let (half, whole) = match (first, second) {
            (Ok(first), Ok(second)) => {
                let parts = [40..72, 80..88];
                let says_so = |part: &std::ops::Range<usize>| first.header[part.clone()] == second.header[part.clone()];
                let same = first.entries == second.entries && parts.iter().all(says_so);
                (first, same.then_some(second))
            }
            (Ok(first), Err(_)) => (first, None),
            (Err(_), Ok(second)) => (second, None),
            (Err(why), Err(_)) => return Err(format!("both of its partition tables (gpt) are broken: {why}")),
        };
        let table = Gpt::of(medium, half, whole.as_ref())?;
        table.judge(medium)?;
        Ok((table, whole.is_none()))
    }

    fn of(medium: &Medium, half: Half, second: Option<&Half>) -> Result<Gpt, String> {
        let Half { mut header, entries } = half;
        let (end, length) = (medium.sectors - 1, medium.sectors_of(entries.len()));
        let is_second = number(&header, 24) == end;
        if !is_second && number(&header, 32) != end {
            return Err("its second partition table is not at its end, as if it had grown: have that moved there \
                        ('sfdisk --relocate gpt-bak-std')"
                .to_owned());
        }
        let at_the_end = end.checked_sub(length).ok_or("it is shorter than its partition table says")?;
        let second_entries = match second {
            Some(second) => number(&second.header, 72),
            None if is_second => number(&header, 72),
            None => at_the_end,
        };
        if is_second {
            put(&mut header, 24, &1_u64.to_le_bytes());
            put(&mut header, 32, &end.to_le_bytes());
            put(&mut header, 72, &2_u64.to_le_bytes());
        }
        Ok(Gpt { header, entries, second_entries })
    }

    /// Refuses what overlaps, or is where no partition may be.
    fn judge(&self, medium: &Medium) -> Result<(), String> {
        let length = medium.sectors_of(self.entries.len());
        let (first, last) = self.usable();
        let begins = number(&self.header, 72);
        let fits = begins >= 2
            && begins.checked_add(length).is_some_and(|end| end <= first)
            && first <= last
            && last < self.second_entries
            && self.second_entries.checked_add(length).is_some_and(|end| end < medium.sectors);
        if !fits {
            return Err("its partition table (gpt) says of itself what cannot be".to_owned());
        }
        let all = self.partitions();
        for one in &all {
            if one.first < first || one.count == 0 || one.last() > last {
                return Err(format!("its partition {} is not where its table says that partitions may be", one.number));
            }
            if all.iter().any(|other| other.number != one.number && other.key == one.key) {
                return Err(format!("two of its partitions have the identity of partition {}", one.number));
            }
        }
        super::partitions::refuse_overlaps(&all)
    }

    /// The first and the last sector that partitions may have.
    pub fn usable(&self) -> (u64, u64) {
        (number(&self.header, 40), number(&self.header, 48))
    }

    fn entry_size(&self) -> usize {
        short(&self.header, 84) as usize
    }

    /// How many partitions there can be.
    pub fn most(&self) -> u32 {
        short(&self.header, 80)
    }

    /// Its partitions.
    pub fn partitions(&self) -> Vec<Partition> {
        let all = self.entries.chunks_exact(self.entry_size()).zip(1..);
        all.filter(|(entry, _)| entry[..16] != [0; 16])
            .map(|(entry, one)| {
                let key = Uuid::from_slice_le(&entry[16..32]).unwrap_or_default();
                let (first, last) = (number(entry, 32), number(entry, 40));
                let count = last.checked_sub(first).map_or(0, |more| more.saturating_add(1));
                let (high, low) = key.as_u64_pair();
                let id = FileId { number: high, born: low };
                Partition { number: one, first, count, key: key.to_string(), id }
            })
            .collect()
    }

    fn entry(&mut self, number: u32) -> &mut [u8] {
        let size = self.entry_size();
        &mut self.entries[(number as usize - 1) * size..][..size]
    }

    /// A partition of that number, which is free, is there.
    pub fn add(&mut self, number: u32, first: u64, count: u64) {
        let entry = self.entry(number);
        entry.fill(0);
        put(entry, 0, &LINUX_DATA.to_bytes_le());
        put(entry, 16, &Uuid::new_v4().to_bytes_le());
        put(entry, 32, &first.to_le_bytes());
        put(entry, 40, &(first + count - 1).to_le_bytes());
    }

    /// One is not there any more.
    pub fn remove(&mut self, number: u32) {
        self.entry(number).fill(0);
    }

    /// One has so many sectors.
    pub fn resize(&mut self, one: u32, count: u64) {
        let entry = self.entry(one);
        let last = number(entry, 32) + count - 1;
        put(entry, 40, &last.to_le_bytes());
    }

    /// Writes it: the first, and then the second, each on disk before the next is begun. Blocks.
    pub fn write(&self, medium: &Medium, with_mbr: bool) -> io::Result<()> {
        let (end, sector) = (medium.sectors - 1, medium.sector as usize);
        if with_mbr {
            medium.write(0, &protective_mbr(medium))?;
        }
        let halves = [(1, end, number(&self.header, 72)), (end, 1, self.second_entries)];
        for (own, other, entries) in halves {
            medium.write(entries, &padded(self.entries.clone(), sector))?;
            let mut header = self.header.clone();
            put(&mut header, 24, &u64::to_le_bytes(own));
            put(&mut header, 32, &u64::to_le_bytes(other));
            put(&mut header, 72, &entries.to_le_bytes());
            put(&mut header, 88, &checksum(&self.entries).to_le_bytes());
            put(&mut header, 16, &[0; 4]);
            let sum = checksum(&header);
            put(&mut header, 16, &sum.to_le_bytes());
            medium.write(own, &padded(header, sector))?;
            medium.file.sync_data()?;
        }
        Ok(())
    }

    /// A disk has none any more: each is torn, the second first, and nothing protects it. Blocks.
    pub fn erase(medium: &Medium) -> io::Result<()> {
        for at in [medium.sectors - 1, 1, 0] {
            medium.write(at, &vec![0; medium.sector as usize])?;
            medium.file.sync_data()?;
        }
        Ok(())
    }
}

impl Half {
    /// The half whose header is there. Error: what is wrong with it.
    fn at(medium: &Medium, sector: u64) -> Result<Half, String> {
        let read = |first, count| medium.read(first, count).map_err(|e| format!("cannot be read: {e}"));
        let mut header = read(sector, 1)?;
        let length = short(&header, 12) as usize;
        let is_header = header.starts_with(SIGNATURE) && length >= HEADER && length <= header.len();
        if !is_header || number(&header, 24) != sector {
            return Err(format!("there is no header in sector {sector}"));
        }
        header.truncate(length);
        let mut unsigned = header.clone();
        put(&mut unsigned, 16, &[0; 4]);
        if checksum(&unsigned) != short(&header, 16) {
            return Err(format!("the checksum of the header in sector {sector} is wrong"));
        }
        let (count, size) = (short(&header, 80), short(&header, 84) as usize);
        if count == 0 || count > MOST_ENTRIES || !(ENTRY..=4096).contains(&size) || !size.is_power_of_two() {
            return Err(format!("the header in sector {sector} says of {count} entries of {size} bytes"));
        }
        let bytes = count as usize * size;
        let at = number(&header, 72);
        let sectors = medium.sectors_of(bytes);
        if at.checked_add(sectors).is_none_or(|end| end > medium.sectors) {
            return Err(format!("the entries of the header in sector {sector} are not on the disk"));
        }
        let mut entries = read(at, sectors)?;
        entries.truncate(bytes);
        match checksum(&entries) == short(&header, 88) {
            true => Ok(Half { header, entries }),
            false => Err(format!("the checksum of the entries of the header in sector {sector} is wrong")),
        }
    }
}

/// Whether a first sector has a partition that only says that there is another table.
pub fn is_protective(first_sector: &[u8]) -> bool {
    first_sector[510..512] == [0x55, 0xaa] && (0..4).any(|one| first_sector[446 + one * 16 + 4] == PROTECTIVE)
}

/// Refuses a disk whose MBR does not protect its table, or has partitions of its own.
fn refuse_other_mbr(first_sector: &[u8]) -> Result<(), String> {
    if !is_protective(first_sector) {
        return Err("there is no partition table (gpt) on it: its first sector does not say so; build the pool first"
            .to_owned());
    }
    let used = (0..4).filter(|one| first_sector[446 + one * 16..][..16].iter().any(|byte| *byte != 0));
    match used.count() {
        1 => Ok(()),
        _ => {
            Err("it has two partition tables, a hybrid: what is changed in one is not in the other; have one of them \
                  removed"
                .to_owned())
        }
    }
}

/// A first sector with one partition, which is all of the disk, for who knows no other table.
fn protective_mbr(medium: &Medium) -> Vec<u8> {
    let mut sector = vec![0; medium.sector as usize];
    let count = u32::try_from(medium.sectors - 1).unwrap_or(u32::MAX);
    put(&mut sector, 446, &[0, 0, 2, 0, PROTECTIVE, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    put(&mut sector, 458, &count.to_le_bytes());
    put(&mut sector, 510, &[0x55, 0xaa]);
    sector
}

fn padded(mut bytes: Vec<u8>, sector: usize) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(sector), 0);
    bytes
}

fn put(to: &mut [u8], at: usize, bytes: &[u8]) {
    to[at..at + bytes.len()].copy_from_slice(bytes);
}

fn number(from: &[u8], at: usize) -> u64 {
    from[at..at + 8].iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte))
}

fn short(from: &[u8], at: usize) -> u32 {
    from[at..at + 4].iter().rev().fold(0, |all, byte| all << 8 | u32::from(*byte))
}

/// The checksum of Ethernet, which is that of headers and entries, too.
fn checksum(bytes: &[u8]) -> u32 {
    let step = |sum: u32, byte: &u8| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0xedb8_8320 } else { sum >> 1 })
    };
    !bytes.iter().fold(u32::MAX, step)
}
