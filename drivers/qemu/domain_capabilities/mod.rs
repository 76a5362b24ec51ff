//! The `<domainCapabilities>` document: what a machine of one kind can have on this host, in libvirt's words.
//!
//! Nothing in it is known by heart. Each value that the XML format has a word for is put into a small definition, which is
//! completed and checked as everybody's is (`choices`); a value against which nothing is said is one that can be had. So
//! the document and `ValidateDomain` never disagree.

mod choices;

use super::capabilities::Capabilities;
use super::check::check;
use super::complete::complete;
use super::firmware::place_variables;
use choices::{Choice, Parts, Section};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;
use virt_model::xml::{Finding, escape_attribute, refusals};

/// What a machine of that kind can have.
pub struct Offer<'a> {
    caps: &'a Capabilities,
    kind: &'a str,
    /// In libvirt's words.
    arch: &'a str,
    /// The emulator's own name of it.
    machine: String,
    /// What is said of a machine that has none of what is asked about.
    said: BTreeSet<String>,
}

impl<'a> Offer<'a> {
    /// Of the machine called `machine`, else of the one that a definition without a machine gets. Error: `NotPossible` where
    /// there is no such machine, or none of that kind runs here; the text says why.
    pub fn new(
        caps: &'a Capabilities,
        kind: &'a str,
        arch: &'a str,
        machine: Option<&str>,
    ) -> Result<Self, DriverError> {
        let mut offer =
            Offer { caps, kind, arch, machine: machine.unwrap_or_default().to_owned(), said: BTreeSet::new() };
        let not_possible = |findings: Vec<Finding>| {
            let why: Vec<String> = findings.into_iter().map(|finding| finding.message).collect();
            DriverError::NotPossible(why.join("; "))
        };
        let (def, findings) = offer.tried(&Parts::default()).map_err(not_possible)?;
        offer.machine = def.os.kind.machine.unwrap_or_default();
        offer.said = findings.iter().map(|finding| finding.message.clone()).collect();
        refusals(findings).map_err(not_possible)?;
        Ok(offer)
    }

    /// The emulator's own name of the machine.
    pub fn machine(&self) -> &str {
        &self.machine
    }

    /// The document. Takes a while: some hundred small definitions are read.
    pub fn document(&self) -> String {
        let mut out = String::from("<domainCapabilities>\n");
        let machine = self.caps.machine(&self.machine);
        for (name, value) in [
            ("path", &*self.caps.binary.to_string_lossy()),
            ("domain", self.kind),
            ("machine", &self.machine),
            ("arch", self.arch),
        ] {
            _ = writeln!(out, "  <{name}>{}</{name}>", escape_attribute(value));
        }
        _ = writeln!(out, "  <vcpu max='{}'/>", machine.map_or(1, |machine| machine.max_cpus));
        let iothreads = self.takes(&Parts { top: "<iothreads>1</iothreads>".to_owned(), ..Parts::default() });
        _ = writeln!(out, "  <iothreads supported='{}'/>", yes_no(iothreads));
        self.write_os(&mut out);
        self.write_cpu(&mut out);
        self.write_section(&mut out, &choices::MEMORY_BACKING, "  ");
        out.push_str("  <devices>\n");
        choices::DEVICES.iter().for_each(|section| self.write_section(&mut out, section, "    "));
        out.push_str("  </devices>\n  <features>\n");
        for (name, part) in choices::FEATURES {
            _ = writeln!(out, "    <{name} supported='{}'/>", yes_no(self.takes(&part())));
        }
        self.write_section(&mut out, &choices::HYPERV, "    ");
        out.push_str("  </features>\n</domainCapabilities>\n");
        out
    }

    fn write_os(&self, out: &mut String) {
        out.push_str("  <os supported='yes'>\n");
        self.write_choice(out, &choices::FIRMWARE, "    ");
        out.push_str("    <loader supported='yes'>\n");
        let fits = |firmware: &&super::firmware::Firmware| firmware.runs_on(&self.caps.arch, &self.machine);
        let mut told = BTreeSet::new();
        let known = self.caps.firmware.iter().filter(fits).filter_map(|firmware| firmware.loader());
        for path in known.filter(|path| told.insert(*path)) {
            _ = writeln!(out, "      <value>{}</value>", escape_attribute(path));
        }
        for choice in &choices::LOADER {
            self.write_choice(out, choice, "      ");
        }
        out.push_str("    </loader>\n  </os>\n");
    }

    fn write_cpu(&self, out: &mut String) {
        out.push_str("  <cpu>\n");
        for (mode, choice) in &choices::CPU_MODES {
            let supported = self.takes(&choices::cpu(&format!("<cpu mode='{mode}'/>")));
            match choice.as_ref().filter(|_| supported) {
                None => _ = writeln!(out, "    <mode name='{mode}' supported='{}'/>", yes_no(supported)),
                Some(choice) => {
                    _ = writeln!(out, "    <mode name='{mode}' supported='yes'>");
                    self.write_choice(out, choice, "      ");
                    out.push_str("    </mode>\n");
                }
            }
        }
        out.push_str("    <mode name='custom' supported='yes'>\n");
        // These are the other modes' by another name.
        let models = self.caps.cpus.iter().filter(|name| !matches!(&***name, "host" | "max"));
        models.for_each(|name| self.write_model(out, name));
        out.push_str("    </mode>\n  </cpu>\n");
    }

    fn write_model(&self, out: &mut String, name: &str) {
        let blockers: Vec<&str> = self.caps.blockers(self.kind == "kvm", name).collect();
        let deprecated = if self.caps.deprecated_cpus.contains(name) { "yes" } else { "no" };
        let (usable, name) = (yes_no(blockers.is_empty()), escape_attribute(name));
        _ = writeln!(out, "      <model usable='{usable}' deprecated='{deprecated}' vendor='unknown'>{name}</model>");
        if blockers.is_empty() {
            return;
        }
        _ = writeln!(out, "      <blockers model='{name}'>");
        for feature in blockers {
            _ = writeln!(out, "        <feature name='{}'/>", escape_attribute(feature));
        }
        out.push_str("      </blockers>\n");
    }

    fn write_section(&self, out: &mut String, section: &Section, indent: &str) {
        let name = section.name;
        let mut inner = String::new();
        let mut can = false;
        for choice in section.choices {
            can |= self.write_choice(&mut inner, choice, &format!("{indent}  "));
        }
        match can {
            true => _ = write!(out, "{indent}<{name} supported='yes'>\n{inner}{indent}</{name}>\n"),
            false => _ = writeln!(out, "{indent}<{name} supported='no'/>"),
        }
    }

    /// Whether there is any.
    fn write_choice(&self, out: &mut String, choice: &Choice, indent: &str) -> bool {
        let values = (choice.values)().into_iter().filter(|value| self.takes(&(choice.part)(value)));
        let values: Vec<&str> = values.collect();
        if values.is_empty() {
            _ = writeln!(out, "{indent}<enum name='{}'/>", choice.name);
            return false;
        }
        _ = writeln!(out, "{indent}<enum name='{}'>", choice.name);
        for value in values {
            _ = writeln!(out, "{indent}  <value>{value}</value>");
        }
        _ = writeln!(out, "{indent}</enum>");
        true
    }

    /// Whether nothing is said against a machine that has that, warnings included.
    fn takes(&self, parts: &Parts) -> bool {
        let said = |findings: Vec<Finding>| findings.iter().all(|finding| self.said.contains(&finding.message));
        self.tried(parts).is_ok_and(|(_, findings)| said(findings))
    }

    /// A machine with that, and what is said of it. Error: it is none.
    fn tried(&self, parts: &Parts) -> Result<(DomainDef, Vec<Finding>), Vec<Finding>> {
        let (kind, arch) = (self.kind, escape_attribute(self.arch));
        let machine = match &*self.machine {
            "" => String::new(),
            machine => format!(" machine='{}'", escape_attribute(machine)),
        };
        let Parts { os_attributes, os, features, top, devices } = parts;
        let text = format!(
            "<domain type='{kind}'><name>machine</name><memory unit='MiB'>512</memory><os{os_attributes}>\
             <type arch='{arch}'{machine}>hvm</type>{os}</os><features><acpi/>{features}</features>{top}\
             <devices>{devices}</devices></domain>"
        );
        let mut def = DomainDef::parse(&text)?;
        def.devices.emulator = Some(self.caps.binary.to_string_lossy().into_owned());
        complete(&mut def, self.caps)?;
        place_variables(&mut def, Path::new("/var/lib/virt"));
        let findings = check(&def, self.caps);
        Ok((def, findings))
    }
}

fn yes_no(yes: bool) -> &'static str {
    if yes { "yes" } else { "no" }
}

#[cfg(test)]
mod tests;
