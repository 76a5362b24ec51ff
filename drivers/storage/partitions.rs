//! The partition table of a disk, of either format: which partitions there are, where a new one has room, and how it is changed.
//! Nothing here asks the kernel.

use super::dos::{self, Dos};
use super::gpt::Gpt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use virt_model::driver::storage::FileId;

/// Each new partition begins and ends at a multiple of so many bytes: no disk has larger blocks.
pub const ALIGNMENT: u64 = 1 << 20;

/// A disk that is open.
pub struct Medium<'a> {
    /// It.
    pub file: &'a File,
    /// How long a sector is, in bytes: at least 512.
    pub sector: u64,
    /// How many there are.
    pub sectors: u64,
}

impl Medium<'_> {
    /// How many sectors so many bytes take.
    pub fn sectors_of(&self, bytes: usize) -> u64 {
        (bytes as u64).div_ceil(self.sector)
    }

    /// Reads sectors. Blocks.
    pub fn read(&self, first: u64, count: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; (count * self.sector) as usize];
        self.file.read_exact_at(&mut bytes, first * self.sector)?;
        Ok(bytes)
    }

    /// Writes whole sectors. Blocks.
    pub fn write(&self, first: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, first * self.sector)
    }
}

/// A partition, in sectors of its disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number, from 1.
    pub number: u32,
    /// Where it begins.
    pub first: u64,
    /// How long it is.
    pub count: u64,
    /// What the kernel calls its PARTUUID.
    pub key: String,
    /// Which one it is.
    pub id: FileId,
}

impl Partition {
    /// Its last sector.
    pub fn last(&self) -> u64 {
        self.first.saturating_add(self.count.saturating_sub(1))
    }

    /// Its sectors.
    pub fn area(&self) -> Range<u64> {
        self.first..self.first + self.count
    }
}

/// What a table is called in documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// That of GUIDs.
    Gpt,
    /// That of DOS.
    Dos,
}

impl Format {
    /// Both.
    pub const NAMES: &[&str] = &["gpt", "dos"];

    /// The one of that name.
    pub fn named(name: &str) -> Option<Format> {
        match name {
            "gpt" => Some(Format::Gpt),
            "dos" => Some(Format::Dos),
            _ => None,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Format::Gpt => "gpt",
            Format::Dos => "dos",
        }
    }
}

/// A partition table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Table {
    /// See [`Gpt`].
    Gpt(Gpt),
    /// See [`Dos`].
    Dos(Dos),
}

impl Table {
    /// An empty one for such a disk. Error: a sentence's end.
    pub fn new(format: Format, medium: &Medium) -> Result<Table, String> {
        match format {
            Format::Gpt => Gpt::new(medium).map(Table::Gpt),
            Format::Dos => Ok(Table::Dos(Dos::new(medium))),
        }
    }

    /// The table of a disk, and whether it is to be written again to be whole. Blocks. Error: a sentence's end; it is none that we can
    /// keep.
    pub fn read(format: Format, medium: &Medium) -> Result<(Table, bool), String> {
        match format {
            Format::Gpt => Gpt::read(medium).map(|(table, is_torn)| (Table::Gpt(table), is_torn)),
            Format::Dos => Dos::read(medium).map(|table| (Table::Dos(table), false)),
        }
    }

    /// Its partitions, by their numbers.
    pub fn partitions(&self) -> Vec<Partition> {
        match self {
            Table::Gpt(table) => table.partitions(),
            Table::Dos(table) => table.partitions(),
        }
    }

    /// How many there can be.
    pub fn most(&self) -> u32 {
        match self {
            Table::Gpt(table) => table.most(),
            Table::Dos(_) => dos::MOST,
        }
    }

    /// The sectors that partitions may have.
    pub fn usable(&self) -> Range<u64> {
        let (first, last) = match self {
            Table::Gpt(table) => table.usable(),
            Table::Dos(table) => table.usable(),
        };
        first..last + 1
    }

    /// A partition of that number, which is free, is there.
    pub fn add(&mut self, number: u32, area: &Range<u64>) {
        let count = area.end - area.start;
        match self {
            Table::Gpt(table) => table.add(number, area.start, count),
            Table::Dos(table) => table.add(number, area.start, count),
        }
    }

    /// One is not there any more.
    pub fn remove(&mut self, number: u32) {
        match self {
            Table::Gpt(table) => table.remove(number),
            Table::Dos(table) => table.remove(number),
        }
    }

    /// One has so many sectors.
    pub fn resize(&mut self, number: u32, count: u64) {
        match self {
            Table::Gpt(table) => table.resize(number, count),
            Table::Dos(table) => table.resize(number, count),
        }
    }

    /// Writes it. Killed anywhere, it is as before or as now. Blocks.
    pub fn write(&self, medium: &Medium) -> io::Result<()> {
        match self {
            Table::Gpt(table) => table.write(medium, false),
            Table::Dos(table) => table.write(medium),
        }
    }

    /// The same on a disk that has none. Blocks.
    pub fn write_anew(&self, medium: &Medium) -> io::Result<()> {
        match self {
            Table::Gpt(table) => table.write(medium, true),
            Table::Dos(table) => table.write(medium),
        }
    }

    /// The free areas, each of whole [units](ALIGNMENT): between what has partitions, and what is `promised` to others.
    pub fn free(&self, sector: u64, promised: &[Range<u64>]) -> Vec<Range<u64>> {
        let mut taken: Vec<Range<u64>> = self.partitions().iter().map(Partition::area).collect();
        taken.extend(promised.iter().cloned());
        free(self.usable(), taken, ALIGNMENT / sector)
    }
}

/// Refuses partitions that have a sector together.
pub fn refuse_overlaps(all: &[Partition]) -> Result<(), String> {
    let mut by_place: Vec<&Partition> = all.iter().collect();
    by_place.sort_by_key(|one| one.first);
    match by_place.windows(2).find(|pair| pair[0].last() >= pair[1].first) {
        None => Ok(()),
        Some(pair) => {
            Err(format!("its partitions {} and {} overlap: have the table put right", pair[0].number, pair[1].number))
        }
    }
}

/// What of an area is not taken, in whole units.
fn free(usable: Range<u64>, mut taken: Vec<Range<u64>>, unit: u64) -> Vec<Range<u64>> {
    taken.sort_by_key(|area| area.start);
    taken.push(usable.end..usable.end);
    let (mut at, mut areas) = (usable.start, Vec::new());
    for area in taken {
        let end = area.start.min(usable.end) / unit * unit;
        let begin = at.next_multiple_of(unit);
        if begin < end {
            areas.push(begin..end);
        }
        at = at.max(area.end);
    }
    areas
}

/// Where so many sectors have room: in the first area that has. `None`: in none.
pub fn place(free: &[Range<u64>], count: u64) -> Option<Range<u64>> {
    let area = free.iter().find(|area| area.end - area.start >= count)?;
    Some(area.start..area.start + count)
}

#[cfg(test)]
#[path = "partitions_tests.rs"]
mod tests;
