//! What makers and products are called: what udev has noted of a device, else the lists that distributions have of PCI and USB.

use super::Host;
use super::attribute::{attribute, bounded};
use std::cell::OnceCell;
use std::collections::HashMap;
use std::path::Path;

/// The largest list that is read, in bytes; that of PCI has 1.4 million.
const LARGEST_LIST: u64 = 16 << 20;

/// The largest note of udev's that is read, in bytes.
const LARGEST_NOTE: u64 = 64 << 10;

/// What udev has noted of a device.
#[derive(Debug, Default)]
pub struct Note {
    properties: HashMap<String, String>,
    /// Links to its file in `/dev`.
    pub links: Vec<String>,
}

impl Note {
    /// The note of this device; empty where udev has none.
    pub fn of(host: &Host, device: &Path, subsystem: &str, number: Option<(u32, u32)>) -> Note {
        let name = device.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let id = match (subsystem, number) {
            ("block", Some((major, minor))) => format!("b{major}:{minor}"),
            (_, Some((major, minor))) => format!("c{major}:{minor}"),
            ("net", None) => format!("n{}", attribute(device, "ifindex").unwrap_or_default()),
            (_, None) => format!("+{subsystem}:{name}"),
        };
        let mut note = Note::default();
        // No name in sysfs leads out of the folder.
        let text = bounded(&host.udev.join("data").join(id), LARGEST_NOTE).unwrap_or_default();
        for line in text.lines() {
            match line.split_once(':') {
                Some(("S", link)) => note.links.push(format!("/dev/{link}")),
                Some(("E", property)) => {
                    if let Some((key, value)) = property.split_once('=') {
                        note.properties.insert(key.to_owned(), value.to_owned());
                    }
                }
                _ => {}
            }
        }
        note.links.sort();
        note
    }

    /// A property; empty where there is none.
    pub fn property(&self, key: &str) -> &str {
        self.properties.get(key).map_or("", |value| value)
    }
}

/// The lists, each read when it is first asked, and dropped with this: they are large.
#[derive(Debug)]
pub struct Lists<'h> {
    host: &'h Host,
    pci: OnceCell<List>,
    usb: OnceCell<List>,
}

impl<'h> Lists<'h> {
    /// The lists of a host.
    pub fn of(host: &'h Host) -> Lists<'h> {
        Lists { host, pci: OnceCell::new(), usb: OnceCell::new() }
    }

    /// Vendor and product of a PCI device, as far as they are listed.
    pub fn pci(&self, vendor: u16, product: u16) -> [String; 2] {
        self.pci.get_or_init(|| List::read(self.host, "pci.ids")).names(vendor, product)
    }

    /// The same of a USB device.
    pub fn usb(&self, vendor: u16, product: u16) -> [String; 2] {
        self.usb.get_or_init(|| List::read(self.host, "usb.ids")).names(vendor, product)
    }
}

#[derive(Debug, Default)]
struct List {
    text: String,
    /// Where the line of each vendor begins.
    vendors: HashMap<u16, usize>,
}

impl List {
    fn read(host: &Host, name: &str) -> List {
        let texts = host.lists.iter().filter_map(|folder| bounded(&folder.join(name), LARGEST_LIST));
        List::new(texts.into_iter().next().unwrap_or_default())
    }

    fn new(text: String) -> List {
        let mut vendors = HashMap::new();
        let mut at = 0;
        for line in text.split_inclusive('\n') {
            // Behind the vendors stand other lists.
            if line.starts_with("C ") {
                break;
            }
            if let Some((number, _)) = entry(line) {
                vendors.entry(number).or_insert(at);
            }
            at += line.len();
        }
        List { text, vendors }
    }

    fn names(&self, vendor: u16, product: u16) -> [String; 2] {
        let Some(lines) = self.vendors.get(&vendor).and_then(|at| self.text.get(*at..)) else {
            return [String::new(), String::new()];
        };
        let mut lines = lines.lines();
        let name = lines.next().and_then(entry).map(|(_, name)| name.to_owned());
        let products = lines.take_while(|line| line.starts_with(['\t', '#']));
        let mut products = products.filter_map(|line| line.strip_prefix('\t').and_then(entry));
        let found = products.find(|(number, _)| *number == product).map(|(_, name)| name.to_owned());
        [name.unwrap_or_default(), found.unwrap_or_default()]
    }
}

/// `8086  Intel Corporation`
fn entry(line: &str) -> Option<(u16, &str)> {
    let (number, name) = line.split_at_checked(4)?;
    let number = u16::from_str_radix(number, 16).ok()?;
    Some((number, name.strip_prefix("  ")?.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_listed_is_found_and_nothing_else() {
        let list = List::new(
            "# a comment\n8086  Intel Corporation\n\t10ca  82576 Virtual Function\n\t\t1af4 10ca  of another\n\
             \t10cb  Other\n10de  NVIDIA\n\t0001  One\nC 00  Unclassified\n1234  no vendor\n"
                .to_owned(),
        );
        let names = |vendor, product| list.names(vendor, product);
        assert_eq!(names(0x8086, 0x10ca), ["Intel Corporation", "82576 Virtual Function"]);
        assert_eq!(names(0x8086, 0x10cb), ["Intel Corporation", "Other"]);
        assert_eq!(names(0x8086, 0x0001), ["Intel Corporation", ""]);
        assert_eq!(names(0x10de, 0x0001), ["NVIDIA", "One"]);
        assert_eq!(names(0x1234, 0x0001), ["", ""]);
    }
}
