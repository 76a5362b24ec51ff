//! What the host itself says: its CPU, and whether KVM can work at all.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::ErrorKind;

/// The host's processor, as the kernel describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// E.g. `x86_64`.
    pub arch: String,
    /// `Intel` or `AMD`, else the kernel's word.
    pub vendor: String,
    /// Marketing name.
    pub model_name: String,
    /// Logical CPUs.
    pub cpus: u32,
    /// The numbers of those that could be used when this was read.
    pub online: BTreeSet<u32>,
    /// Sockets, cores in each, threads in each core.
    pub topology: (u32, u32, u32),
    /// The kernel's names of CPU features.
    pub flags: BTreeSet<String>,
}

impl Host {
    /// Reads `/proc/cpuinfo`; what it does not say stays empty.
    pub fn read() -> Self {
        Self::parse(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
    }

    fn parse(cpuinfo: &str) -> Self {
        let field = |name: &'static str| values(cpuinfo, name).next().unwrap_or_default();
        let vendor = match field("vendor_id") {
            "GenuineIntel" => "Intel",
            "AuthenticAMD" => "AMD",
            other => other,
        };
        let cpus = values(cpuinfo, "processor").count().max(1) as u32;
        let sockets = values(cpuinfo, "physical id").collect::<BTreeSet<_>>().len().max(1) as u32;
        let cores = field("cpu cores").parse().unwrap_or(cpus).max(1);
        Host {
            arch: std::env::consts::ARCH.to_owned(),
            vendor: vendor.to_owned(),
            model_name: field("model name").to_owned(),
            cpus,
            online: values(cpuinfo, "processor").filter_map(|number| number.parse().ok()).collect(),
            topology: (sockets, cores, (cpus / (sockets * cores)).max(1)),
            flags: field("flags").split_whitespace().map(str::to_owned).collect(),
        }
    }

    fn virtualizes(&self) -> Result<(), String> {
        if self.arch != "x86_64" || self.flags.contains("vmx") || self.flags.contains("svm") {
            return Ok(());
        }
        let place = if self.flags.contains("hypervisor") { ", and this host is itself a virtual machine" } else { "" };
        Err(format!("this host's CPU offers neither vmx nor svm (hardware virtualization){place}"))
    }
}

fn values<'a>(cpuinfo: &'a str, name: &'static str) -> impl Iterator<Item = &'a str> {
    let pairs = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    pairs.filter(move |(key, _)| key.trim() == name).map(|(_, value)| value.trim())
}

/// Whether the host's half of KVM is there: the device opens for reading and writing, and the CPU can virtualize. What
/// QEMU makes of it is asked of QEMU.
pub fn kvm() -> Result<(), String> {
    OpenOptions::new().read(true).write(true).open("/dev/kvm").map_err(|error| match error.kind() {
        ErrorKind::NotFound => "there is no /dev/kvm (is the kvm module loaded?)".to_owned(),
        ErrorKind::PermissionDenied => "/dev/kvm may not be opened by this user (is it in group kvm?)".to_owned(),
        _ => format!("/dev/kvm does not open: {error}"),
    })?;
    Host::read().virtualizes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Some CPU\nphysical id\t: 0\ncpu cores\t: 1\n\
        flags\t\t: fpu vme vmx\n\nprocessor\t: 1\nphysical id\t: 0\ncpu cores\t: 1\n";

    #[test]
    fn reads_what_the_kernel_says() {
        let host = Host::parse(TWO);
        assert_eq!((host.vendor.as_str(), host.cpus, host.topology), ("Intel", 2, (1, 1, 2)));
        assert_eq!(host.online, BTreeSet::from([0, 1]));
        assert!(host.virtualizes().is_ok());
    }

    #[test]
    fn a_cpu_without_virtualization_says_so() {
        let mut host = Host::parse(&TWO.replace("vmx", "hypervisor"));
        host.arch = "x86_64".to_owned();
        assert!(host.virtualizes().unwrap_err().contains("neither vmx nor svm"));
        assert!(Host::parse("").virtualizes().is_err());
    }
}
