//! The long properties of `org.virt.Domain`: what is shown of its devices, and what there are many of.

use super::paths;
use crate::bus::wire::{Body, Long, Value};
use virt_service::facts::DomainFacts;
use virt_service::shown::{Entry, Said, Section};
use virt_service::verb;

impl Long for DomainFacts {
    fn put(&self, property: &str, body: &mut Body) {
        let only = |section| self.config.shown.only(section);
        match property {
            "Disks" => devices(self, Section::Disks, body),
            "Interfaces" => devices(self, Section::Interfaces, body),
            "Graphics" => devices(self, Section::Graphics, body),
            "Consoles" => devices(self, Section::Consoles, body),
            "Channels" => devices(self, Section::Channels, body),
            "HostDevices" => devices(self, Section::HostDevices, body),
            "Firmware" => one(self, Section::Firmware, body),
            "TPM" => one(self, Section::Tpm, body),
            "OperatingSystem" => match only(Section::OperatingSystem) {
                Some(Said::Text(system)) => body.text(system),
                _ => body.text(""),
            },
            "BootOrder" => match only(Section::BootOrder) {
                Some(Said::Texts(order)) => texts(order.into_iter(), body),
                _ => texts(std::iter::empty::<&str>(), body),
            },
            "Snapshots" => texts(self.snapshots.iter().map(|name| paths::snapshot(self.uuid, name)), body),
            "PendingChanges" => pending(self, body),
            // A property without a line here has no value, which a test finds.
            _ => {}
        }
    }
}

/// `as`, `ao`
fn texts(texts: impl Iterator<Item: AsRef<str>>, body: &mut Body) {
    body.array(4, |body| texts.for_each(|text| body.text(text.as_ref())));
}

/// `aa{sv}`: what runs, then what is stored.
fn devices(facts: &DomainFacts, section: Section, body: &mut Body) {
    let runs = facts.id != 0;
    body.array(4, |body| {
        for (number, device) in facts.config.shown.entries(section).enumerate() {
            body.array(8, |body| {
                said(facts, section, device, body);
                if section == Section::Channels && runs {
                    entry("connected", Value::Bool(facts.open_channels.contains(&number)), body);
                }
                entry("stored", Value::Bool(!runs), body);
            });
        }
        for device in facts.stored.iter().flat_map(|stored| stored.shown.entries(section)) {
            body.array(8, |body| {
                said(facts, section, device, body);
                entry("stored", Value::Bool(true), body);
            });
        }
    });
}

/// `a(sss)`: path, what runs, what is stored.
fn pending(facts: &DomainFacts, body: &mut Body) {
    body.array(8, |body| {
        for change in facts.pending.iter() {
            body.align(8);
            [&change.path, &change.source, &change.target].into_iter().for_each(|text| body.text(text));
        }
    });
}

/// `a{sv}` of what there is one of, or none.
fn one(facts: &DomainFacts, section: Section, body: &mut Body) {
    body.array(8, |body| {
        facts.config.shown.entries(section).take(1).for_each(|device| said(facts, section, device, body))
    });
}

fn said(facts: &DomainFacts, section: Section, device: Entry<'_>, body: &mut Body) {
    let opens = if section == Section::Graphics { verb::OPEN_GRAPHICS } else { verb::OPEN_CONSOLE };
    let lacks = facts.lacks.contains(&opens.member);
    for (key, said) in device {
        match said {
            Said::Text(text) => entry(key, Value::Str(text), body),
            Said::Number(number) => entry(key, Value::U32(number), body),
            Said::Flag(flag) => entry(key, Value::Bool(flag && !(key == "openable" && lacks)), body),
            Said::Texts(texts) => entry(key, Value::Strs(&texts), body),
        }
    }
}

fn entry(key: &str, value: Value<'_>, body: &mut Body) {
    body.align(8);
    body.text(key);
    body.variant(&value);
}
