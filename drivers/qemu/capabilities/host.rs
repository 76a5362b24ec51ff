//! What the host itself says: its CPU, and whether it has KVM.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;

/// Where the kernel's half of KVM is opened.
pub const KVM: &str = "/dev/kvm";

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
}

fn values<'a>(cpuinfo: &'a str, name: &'static str) -> impl Iterator<Item = &'a str> {
    let pairs = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    pairs.filter(move |(key, _)| key.trim() == name).map(|(_, value)| value.trim())
}

/// Whether the host's half of KVM is there: the device opens for reading and writing. The CPU's flags are not asked: KVM
/// works on hosts whose CPUs show none of hardware virtualization. What QEMU makes of it is asked of QEMU, and again when
/// the device's rights have changed: the answer is when that was, in seconds and nanoseconds.
pub fn kvm() -> Result<(i64, i64), String> {
    let device = OpenOptions::new().read(true).write(true).open(KVM).and_then(|device| device.metadata());
    device.map(|device| (device.ctime(), device.ctime_nsec())).map_err(|error| why_not(error.kind(), &error))
}

fn why_not(kind: ErrorKind, error: &impl std::fmt::Display) -> String {
    match kind {
        ErrorKind::NotFound => format!(
            "there is no {KVM} (load the module kvm_intel or kvm_amd, and see that virtualization is on in the firmware's \
             setup)"
        ),
        ErrorKind::PermissionDenied => format!("{KVM} may not be opened by this user (is it in group kvm?)"),
        _ => format!("{KVM} does not open: {error}"),
    }
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
    }

    #[test]
    fn a_host_without_kvm_says_what_to_do() {
        assert!(why_not(ErrorKind::NotFound, &"").contains("load the module"));
        assert!(why_not(ErrorKind::PermissionDenied, &"").contains("group kvm"));
        assert!(why_not(ErrorKind::Other, &"out of order").ends_with("/dev/kvm does not open: out of order"));
    }
}
