//! A partition table of DOS as it is in the first sector of a disk: four partitions, and what boots, which stays as it is. One sector
//! is written at once: it is as before, or as after.

use super::gpt;
use super::partitions::{Medium, Partition, refuse_overlaps};
use std::io;
use uuid::Uuid;
use virt_model::driver::storage::FileId;

/// Where the disk's identity is, where the partitions are, and where the sign that they are.
const IDENTITY: usize = 440;
const ENTRIES: usize = 446;
const SIGN: usize = 510;
/// So long an entry is, and so many there are.
const ENTRY: usize = 16;
pub const MOST: u32 = 4;
/// The types of partitions that only hold others.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// The type of partitions that we make: Linux.
const LINUX: u8 = 0x83;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dos {
    sector: Vec<u8>,
    /// How many sectors of the disk partitions can have.
    end: u64,
}

impl Dos {
    /// An empty one for such a disk.
    pub fn new(medium: &Medium) -> Dos {
        let mut sector = vec![0; medium.sector as usize];
        let identity = Uuid::new_v4().as_u128() as u32 | 1;
        sector[IDENTITY..IDENTITY + 4].copy_from_slice(&identity.to_le_bytes());
        sector[SIGN..SIGN + 2].copy_from_slice(&[0x55, 0xaa]);
        Dos { sector, end: medium.sectors.min(u64::from(u32::MAX)) }
    }

    /// The table of a disk. Error: a sentence's end; it is none that we can keep.
    pub fn read(medium: &Medium) -> Result<Dos, String> {
        let sector = medium.read(0, 1).map_err(|e| format!("cannot be read: {e}"))?;
        if sector[SIGN..SIGN + 2] != [0x55, 0xaa] {
            return Err("there is no partition table (dos) on it; build the pool first".to_owned());
        }
        if gpt::is_protective(&sector) {
            return Err(
                "its first sector protects a partition table of another format: say <format type='gpt'/>".to_owned()
            );
        }
        let table = Dos { sector, end: medium.sectors.min(u64::from(u32::MAX)) };
        table.judge()?;
        Ok(table)
    }

    fn entry(&self, number: u32) -> &[u8] {
        &self.sector[ENTRIES + (number as usize - 1) * ENTRY..][..ENTRY]
    }

    fn judge(&self) -> Result<(), String> {
        let all = self.partitions();
        // A sign that it boots says nothing of partitions.
        if all.is_empty() && self.identity() == 0 {
            return Err("its first sector boots, and is no partition table: it has no identity and no partition; build the pool \
                        with overwrite, and lose what is on it"
                .to_owned());
        }
        for number in 1..=MOST {
            let entry = self.entry(number);
            let (first, count) = (word(entry, 8), word(entry, 12));
            let is_used = entry[4] != 0 || count != 0;
            if is_used && !matches!(entry[0], 0 | 0x80) {
                return Err(format!("its partition {number} says of itself what cannot be, as if it were none"));
            }
            if EXTENDED.contains(&entry[4]) {
                return Err(format!(
                    "its partition {number} is an extended one, with others in it, which is not supported here: use a disk \
                     with four partitions at most, or with a table of format 'gpt'"
                ));
            }
            if is_used && (entry[4] == 0 || first == 0 || count == 0 || first + count > self.end) {
                return Err(format!("its partition {number} is not on the disk"));
            }
        }
        refuse_overlaps(&all)
    }

    fn identity(&self) -> u32 {
        word(&self.sector, IDENTITY) as u32
    }

    /// The first and the last sector that partitions may have.
    pub fn usable(&self) -> (u64, u64) {
        (1, self.end - 1)
    }

    /// Its partitions.
    pub fn partitions(&self) -> Vec<Partition> {
        let used = (1..=MOST).filter(|number| self.entry(*number)[4] != 0);
        used.map(|number| {
            let entry = self.entry(number);
            let (first, count, identity) = (word(entry, 8), word(entry, 12), u64::from(self.identity()));
            // As the kernel calls it. What is elsewhere later is another.
            let key = format!("{identity:08x}-{number:02x}");
            let id = FileId { number: identity << 8 | u64::from(number), born: first << 32 | count };
            Partition { number, first, count, key, id }
        })
        .collect()
    }

    fn put(&mut self, number: u32, entry: &[u8]) {
        let at = ENTRIES + (number as usize - 1) * ENTRY;
        self.sector[at..at + ENTRY].copy_from_slice(entry);
    }

    /// A partition of that number, which is free, is there.
    pub fn add(&mut self, number: u32, first: u64, count: u64) {
        // Who counts in cylinders is told that it is beyond them.
        let mut entry = [0, 0xfe, 0xff, 0xff, LINUX, 0xfe, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0];
        entry[8..12].copy_from_slice(&(first as u32).to_le_bytes());
        entry[12..].copy_from_slice(&(count as u32).to_le_bytes());
        self.put(number, &entry);
    }

    /// One is not there any more.
    pub fn remove(&mut self, number: u32) {
        self.put(number, &[0; ENTRY]);
    }

    /// One has so many sectors.
    pub fn resize(&mut self, number: u32, count: u64) {
        let mut entry = self.entry(number).to_vec();
        entry[12..].copy_from_slice(&(count as u32).to_le_bytes());
        self.put(number, &entry);
    }

    /// Writes it. Blocks.
    pub fn write(&self, medium: &Medium) -> io::Result<()> {
        medium.write(0, &self.sector)?;
        medium.file.sync_data()
    }
}

fn word(from: &[u8], at: usize) -> u64 {
    from[at..at + 4].iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte))
}
