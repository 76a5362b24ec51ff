//! What becomes of documents that others write: completed, held against a QEMU, and as arguments. Nothing is started.

mod qemu;

use qemu::{DIR, caps, message, parse, place};
use virt_drivers::qemu::capabilities::Capabilities;
use virt_drivers::qemu::check::check;
use virt_drivers::qemu::command::{Command, build};
use virt_drivers::qemu::complete::complete;
use virt_model::domain::{DomainDef, Form};
use virt_model::xml::FindingKind;

const STORED: Form = Form { inactive: true, secure: true, migratable: false };

/// A small machine; `outside` stands before its devices.
fn text(machine: &str, outside: &str, devices: &str) -> String {
    let memory = if outside.contains("<memory") { "" } else { "<memory unit='MiB'>64</memory>" };
    format!(
        "<domain type='kvm'><name>a</name>{memory}<vcpu>2</vcpu>\
         <os><type arch='x86_64' machine='{machine}'>hvm</type></os><features><acpi/></features>\
         {outside}<devices>{devices}</devices></domain>"
    )
}

fn completed(machine: &str, outside: &str, devices: &str) -> DomainDef {
    let text = text(machine, outside, devices);
    let mut def = parse(&text);
    complete(&mut def, &caps()).unwrap_or_else(|findings| panic!("{}\n{text}", message(&findings)));
    def
}

fn built(def: &DomainDef, caps: &Capabilities) -> Command {
    build(def, caps, &place(DIR)).unwrap_or_else(|findings| panic!("{}\n{}", message(&findings), def.write(STORED)))
}

/// The arguments in one line.
fn arguments(def: &DomainDef) -> String {
    built(def, &caps()).args.join(" ")
}

/// What keeps it from starting, in one text.
fn refusals(def: &DomainDef, caps: &Capabilities) -> String {
    let mut found = check(def, caps);
    found.retain(|finding| finding.kind != FindingKind::Warning);
    message(&found)
}

fn warnings(def: &DomainDef, caps: &Capabilities) -> String {
    let mut found = check(def, caps);
    found.retain(|finding| finding.kind == FindingKind::Warning);
    message(&found)
}

#[test]
fn x1_memory_is_rounded_up_to_mib_and_shown_so() {
    for (outside, size, shown) in [
        ("<memory unit='KiB'>66001</memory>", "size=66560k", "<memory unit='KiB'>66560</memory>"),
        ("<memory unit='KB'>66001</memory>", "size=64512k", "<memory unit='KiB'>64512</memory>"),
        ("<memory unit='b'>67108865</memory>", "size=66560k", "<currentMemory unit='KiB'>66560</currentMemory>"),
        (
            "<memory unit='KiB'>66001</memory><currentMemory unit='KiB'>66001</currentMemory>",
            "size=66560k",
            "<currentMemory unit='KiB'>66560</currentMemory>",
        ),
        (
            "<memory unit='KiB'>66001</memory><currentMemory unit='KiB'>33001</currentMemory>",
            "size=66560k",
            "<currentMemory unit='KiB'>33001</currentMemory>",
        ),
        ("<memory unit='MiB'>64</memory>", "size=65536k", "<memory unit='KiB'>65536</memory>"),
    ] {
        let def = completed("q35", outside, "");
        assert!(arguments(&def).contains(size), "{outside}: {}", arguments(&def));
        assert!(def.write(STORED).contains(shown), "{outside}: {}", def.write(STORED));
        let backend = format!("\"size\":{}", size[5..size.len() - 1].parse::<u64>().unwrap() * 1024);
        assert!(arguments(&def).contains(&backend), "{outside}: {}", arguments(&def));
    }
}

#[test]
fn x1_cells_and_plugged_memory_are_rounded_too() {
    let cells = "<memory unit='KiB'>1</memory><maxMemory slots='2' unit='KiB'>1000001</maxMemory>\
                 <cpu><numa><cell id='0' cpus='0' memory='33001'/><cell id='1' cpus='1' memory='33001'/></numa></cpu>";
    let dimm = "<memory model='dimm'><target><size unit='KiB'>30001</size><node>0</node></target></memory>";
    let def = completed("q35", cells, dimm);
    let arguments = arguments(&def);
    for part in ["-m size=67584k,slots=2,maxmem=1000448k", "\"size\":34603008", "\"size\":31457280"] {
        assert!(arguments.contains(part), "{part}: {arguments}");
    }
    assert!(def.write(STORED).contains("<memory unit='KiB'>98304</memory>"), "{}", def.write(STORED));
}
