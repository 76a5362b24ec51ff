//! The `<capabilities>` document: host, and what guests it can run.

use super::{Capabilities, Host, Machine};
use std::fmt::Write;
use virt_model::xml::escape_attribute;

/// Writes the document for this host and the emulators that could be asked; in libvirt's words, so that its readers
/// understand it.
pub fn document(host: &Host, emulators: &[&Capabilities]) -> String {
    let mut out = String::from("<capabilities>\n\n");
    write_host(&mut out, host);
    for emulator in emulators.iter().filter(|e| e.absent.is_none()) {
        write_guest(&mut out, emulator);
    }
    out.push_str("</capabilities>\n");
    out
}

fn write_host(out: &mut String, host: &Host) {
    let (sockets, cores, threads) = host.topology;
    let mut cpu = format!("    <cpu>\n      <arch>{}</arch>\n", escape_attribute(&host.arch));
    if !host.vendor.is_empty() {
        _ = writeln!(cpu, "      <vendor>{}</vendor>", escape_attribute(&host.vendor));
    }
    _ = writeln!(cpu, "      <topology sockets='{sockets}' dies='1' cores='{cores}' threads='{threads}'/>");
    for flag in &host.flags {
        _ = writeln!(cpu, "      <feature name='{}'/>", escape_attribute(&flag.replace('_', "-")));
    }
    cpu.push_str("    </cpu>\n");
    _ = write!(out, "  <host>\n{cpu}  </host>\n\n");
}

fn write_guest(out: &mut String, emulator: &Capabilities) {
    let (arch, wordsize) = match emulator.arch.as_str() {
        "i386" => ("i686", 32),
        "x86_64" => ("x86_64", 64),
        other => (other, if other.contains("64") { 64 } else { 32 }),
    };
    _ = writeln!(out, "  <guest>\n    <os_type>hvm</os_type>\n    <arch name='{}'>", escape_attribute(arch));
    _ = writeln!(out, "      <wordsize>{wordsize}</wordsize>");
    _ = writeln!(out, "      <emulator>{}</emulator>", escape_attribute(&emulator.binary.to_string_lossy()));
    let mut machines: Vec<&Machine> = emulator.machines.iter().collect();
    machines.sort_by_key(|machine| rank(machine));
    machines.into_iter().for_each(|machine| write_machine(out, machine));
    out.push_str("      <domain type='qemu'/>\n");
    if emulator.kvm.is_ok() {
        out.push_str("      <domain type='kvm'/>\n");
    }
    out.push_str("    </arch>\n    <features>\n      <acpi default='on' toggle='yes'/>\n");
    out.push_str("      <apic default='on' toggle='no'/>\n      <cpuselection/>\n      <deviceboot/>\n");
    out.push_str("    </features>\n  </guest>\n\n");
}

/// Clients take the first machine: the newest `pc`, the newest `q35`, then other versions of these, then all else. Within
/// each, the emulator's order stays.
fn rank(machine: &Machine) -> usize {
    let name = &*machine.name;
    let aliases = ["pc", "q35"];
    let newest = aliases.iter().position(|alias| name == *alias || machine.alias.as_deref() == Some(*alias));
    let version = || ["pc-i440fx-", "pc-q35-"].iter().any(|family| name.starts_with(family));
    newest.unwrap_or_else(|| aliases.len() + usize::from(!version()))
}

fn write_machine(out: &mut String, machine: &Machine) {
    let deprecated = if machine.deprecated { " deprecated='yes'" } else { "" };
    let (max, name) = (machine.max_cpus, escape_attribute(&machine.name));
    _ = writeln!(out, "      <machine maxCpus='{max}'{deprecated}>{name}</machine>");
    if let Some(alias) = &machine.alias {
        _ = writeln!(
            out,
            "      <machine canonical='{name}' maxCpus='{max}'{deprecated}>{}</machine>",
            escape_attribute(alias)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn clients_that_take_the_first_machine_get_a_pc() {
        let mut qemu = Capabilities::absent(Path::new("/usr/bin/qemu"), String::new());
        (qemu.absent, qemu.arch) = (None, "x86_64".into());
        let machine = |name: &str, alias: Option<&str>| {
            let (name, alias) = (name.to_owned(), alias.map(str::to_owned));
            Machine { name, alias, max_cpus: 1, is_default: false, deprecated: false }
        };
        qemu.machines = vec![
            machine("isapc", None),
            machine("pc-q35-7.1", None),
            machine("pc-q35-7.2", Some("q35")),
            machine("microvm", None),
            machine("pc-i440fx-7.2", Some("pc")),
        ];
        let text = document(&Host::default(), &[&qemu]);
        let names = text.split("</machine>").filter_map(|line| line.rsplit_once('>')).map(|(_, name)| name);
        let names: Vec<_> = names.filter(|name| !name.trim().is_empty()).collect();
        assert_eq!(names, ["pc-i440fx-7.2", "pc", "pc-q35-7.2", "q35", "pc-q35-7.1", "isapc", "microvm"]);
    }

    #[test]
    fn names_the_guests_that_can_run() {
        let host = Host { arch: "x86_64".into(), vendor: "AMD".into(), topology: (1, 2, 1), ..Host::default() };
        let mut qemu = Capabilities::absent(Path::new("/usr/bin/q<emu"), String::new());
        (qemu.absent, qemu.arch) = (None, "x86_64".into());
        let alias = Some("q35".to_owned());
        qemu.machines =
            vec![Machine { name: "pc-q35-7.2".into(), alias, max_cpus: 288, is_default: false, deprecated: false }];
        let gone = Capabilities::absent(Path::new("/gone"), "gone".into());
        insta::assert_snapshot!(document(&host, &[&qemu, &gone]), @r"
        <capabilities>

          <host>
            <cpu>
              <arch>x86_64</arch>
              <vendor>AMD</vendor>
              <topology sockets='1' dies='1' cores='2' threads='1'/>
            </cpu>
          </host>

          <guest>
            <os_type>hvm</os_type>
            <arch name='x86_64'>
              <wordsize>64</wordsize>
              <emulator>/usr/bin/q&lt;emu</emulator>
              <machine maxCpus='288'>pc-q35-7.2</machine>
              <machine canonical='pc-q35-7.2' maxCpus='288'>q35</machine>
              <domain type='qemu'/>
            </arch>
            <features>
              <acpi default='on' toggle='yes'/>
              <apic default='on' toggle='no'/>
              <cpuselection/>
              <deviceboot/>
            </features>
          </guest>

        </capabilities>
        ");
    }
}
