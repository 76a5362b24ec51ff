//! What in a definition this driver on this host cannot run: every reason, each with its place.
//!
//! Two questions. `table`: is every element and attribute one that acts, or is known to be advisory? What is neither is
//! refused by name, so nothing is dropped in silence. The other files: can what acts be had here, in this combination?
//! What no host could have is the model's matter (`cross`), and reported with the rest.

mod board;
mod chardev;
mod devices;
mod filesystem;
mod hostdev;
mod memory;
mod net;
mod place;
mod platform;
mod reasons;
mod server;
mod storage;
mod table;
mod tpm;
mod tune;

pub use table::{Standing, standing};

use super::capabilities::{Capabilities, End};
use super::checked::Checked;
use super::command;
use super::complete::{Board, name_devices};
use super::plan::Command;
use std::path::Path;
use std::sync::Arc;
use virt_model::domain::DomainDef;
use virt_model::xml::add_findings;
use virt_model::xml::{Finding, FindingKind, Place, refusals};

/// The command line of a definition that this QEMU can run; built once, and looked at. Error: what refuses it.
pub fn checked_command(
    def: &DomainDef,
    caps: &Capabilities,
    place: &command::Place<'_>,
) -> Result<Command, Vec<Finding>> {
    let (findings, command) = examine(def, def, caps, place);
    refusals(findings)?;
    command
}

/// A definition that can run with these capabilities.
pub struct Passed(DomainDef, Arc<Capabilities>);

impl Passed {
    /// Whether it is that very definition.
    pub fn is(&self, def: &DomainDef) -> bool {
        self.0 == *def
    }

    /// The command line of what it has become on its way to its start: ports, sockets and devices of the host's have been chosen
    /// for it, of which nothing is refused. Error: what keeps it from being built.
    pub fn command(&self, started: &DomainDef, place: &command::Place<'_>) -> Result<Command, Vec<Finding>> {
        command::build(Checked::of(started), &self.1, place)
    }
}

/// Looks at a definition as [`examine`] does. Error: what refuses it, `found` on the host among it.
pub fn pass(
    def: DomainDef,
    started: &DomainDef,
    caps: Arc<Capabilities>,
    place: &command::Place<'_>,
    found: Vec<Finding>,
) -> Result<(Passed, Command), Vec<Finding>> {
    let (mut findings, command) = examine(&def, started, &caps, place);
    findings.extend(found);
    refusals(findings)?;
    Ok((Passed(def, caps), command?))
}

/// Everything that keeps `def` from running as it says, as [`check`] tells it, and the command line that was looked at for
/// that: of `started`, which is the same with its USB devices found. Error of the second: what keeps it from being built;
/// nothing where it was not built, because something is refused.
fn examine(
    def: &DomainDef,
    started: &DomainDef,
    caps: &Capabilities,
    place: &command::Place<'_>,
) -> (Vec<Finding>, Result<Command, Vec<Finding>>) {
    let mut check = Check::new(def, caps);
    check.rules();
    if check.log.iter().any(|finding| finding.kind != FindingKind::Warning) {
        return (check.log, Err(Vec::new()));
    }
    let command = command::build(Checked::of(started), caps, place);
    if let Ok(command) = &command {
        check.devices_of(command);
    }
    (check.log, command)
}

/// Everything that keeps `def` from running as it says; warnings for what runs, but not quite so. Empty: QEMU would be
/// started. Files are not looked at: that is for `start`, which needs them then.
pub fn check(def: &DomainDef, caps: &Capabilities) -> Vec<Finding> {
    let nowhere = command::Place { runtime_dir: Path::new("/"), monitor_fd: 0, now: 0, east_of_utc: 0, sandbox: false };
    // It is built to be looked at, and run by nobody. What keeps it from being built is told when it is to be run.
    examine(def, def, caps, &nowhere).0
}

/// What an argument of `-device` names.
fn driver_and_id(argument: &str) -> Option<(String, String)> {
    if let Ok(device) = serde_json::from_str::<serde_json::Value>(argument) {
        return Some((device["driver"].as_str()?.to_owned(), device["id"].as_str().unwrap_or_default().to_owned()));
    }
    let id = argument.split(',').find_map(|word| word.strip_prefix("id="));
    Some((argument.split(',').next()?.to_owned(), id.unwrap_or_default().to_owned()))
}

/// A check as it proceeds.
struct Check<'a> {
    def: &'a DomainDef,
    caps: &'a Capabilities,
    board: Board,
    kvm: bool,
    log: Vec<Finding>,
}

impl<'a> Check<'a> {
    fn new(def: &'a DomainDef, caps: &'a Capabilities) -> Check<'a> {
        Check { def, caps, board: Board::of(def), kvm: def.kind == "kvm", log: Vec::new() }
    }
}

impl Check<'_> {
    /// What can be said of the definition alone.
    fn rules(&mut self) {
        if let Some(why) = &self.caps.absent {
            self.refuse(&self.def.devices.at.child("emulator"), format!("this emulator cannot be used: {why}"));
            return add_findings(&mut self.log, self.def.contradictions());
        }
        table::walk(self);
        self.platform();
        self.memory();
        self.features_of_the_board();
        self.storage();
        self.throttling();
        self.tuning();
        self.devices();
        self.places();
        self.filesystems();
        self.board();
        self.host_devices();
        self.tpms();
        add_findings(&mut self.log, self.def.contradictions());
    }

    fn refuse(&mut self, place: &Place, message: impl Into<String>) {
        self.log.push(Finding::new(FindingKind::Unsupported, place, message));
    }

    fn refuse_if(&mut self, condition: bool, place: &Place, message: &str) {
        if condition {
            self.refuse(place, message);
        }
    }

    /// Refuses what is encrypted where the host has no certificates for it.
    fn certified(&mut self, end: End, place: &Place) {
        if let Err(missing) = self.caps.site.certificates(end) {
            self.refuse(place, format!("encryption needs the host's certificates: there is no {}", missing.display()));
        }
    }

    fn warn_if(&mut self, condition: bool, place: &Place, message: &str) {
        if condition {
            self.log.push(Finding::new(FindingKind::Warning, place, message));
        }
    }

    /// Whatever is said of it before: this QEMU has every device that its command line names.
    fn devices_of(&mut self, command: &Command) {
        let pairs = command.args.windows(2).filter(|pair| pair[0] == "-device");
        let named: Vec<(String, String)> = pairs.filter_map(|pair| driver_and_id(&pair[1])).collect();
        if named.iter().all(|(driver, _)| self.caps.has_device(driver)) {
            return;
        }
        let mut aliased = self.def.clone();
        name_devices(&mut aliased);
        for (driver, id) in named {
            let found = aliased
                .devices
                .infos()
                .into_iter()
                .find(|(info, _)| info.alias() == Some(&id))
                .map(|(_, place)| place.clone());
            self.need_device(&found.unwrap_or_else(|| self.def.devices.at.clone()), &driver);
        }
    }

    /// Refuses a device type that this QEMU does not have.
    fn need_device(&mut self, place: &Place, device: &str) {
        if !self.caps.has_device(device) {
            let remedy = match device {
                "usb-redir" | "qxl" | "qxl-vga" => {
                    "; install the package with QEMU's modules (Debian: qemu-system-common)"
                }
                name if name.starts_with("virtio-gpu") || name.starts_with("virtio-vga") => {
                    "; install the package with QEMU's modules (Debian: qemu-system-common)"
                }
                _ => "",
            };
            let (binary, (major, minor, _)) = (self.caps.binary.display(), self.caps.version);
            self.refuse(place, format!("{binary} (version {major}.{minor}) has no device '{device}'{remedy}"));
        }
    }
}
