//! The TPM: a device in front, an emulator's socket behind it.

use super::args::Props;
use super::{Builder, id, list};
use crate::qemu::plan::{Companion, Link, Loss, Role, Secret, SecretContent};
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;
use uuid::Uuid;
use virt_model::device::Tpm;
use virt_model::device::tpm::{TpmKind, TpmModel, TpmVersion};
use virt_model::domain::DomainDef;
use virt_model::secret::SecretName;

/// Where an emulator finds its end of the control channel.
const CONTROL: RawFd = 3;
/// Where it, or what makes its state, finds what the state is encrypted with. It closes that when it has read it.
const KEY: RawFd = 6;
/// Where an emulator finds the same again, for the state that QEMU asks it for and keeps with a machine's memory.
const MIGRATION_KEY: RawFd = 7;
/// By what the state is encrypted.
const CIPHER: &str = "aes-256-cbc";
/// How long the first state of a TPM may take: its keys are made.
const SETUP: Duration = Duration::from_secs(120);

/// Where the state of a guest's emulated TPM is: a folder with a file `tpm2-00.permall` (of version 1.2, `tpm-00.permall`)
/// and, while the guest runs, others beside it. It belongs to QEMU's user. Copied while the guest is off, the folder is
/// all of the TPM; while it runs, QEMU asks the emulator for the state and keeps it with its own.
pub fn tpm_state(state_dir: &Path, guest: Uuid) -> PathBuf {
    state_dir.join("tpm").join(guest.to_string())
}

/// The folder with the state of that guest's TPM, if it has one that is emulated here.
pub fn tpm_state_of(def: &DomainDef, state_dir: &Path) -> Option<PathBuf> {
    let tpm = def.devices.tpms.iter().find(|tpm| tpm.backend.kind == TpmKind::Emulator)?;
    let named = tpm.backend.source.as_ref().and_then(|source| source.path.as_deref());
    Some(named.map_or_else(|| tpm_state(state_dir, def.uuid), PathBuf::from))
}

impl Builder<'_> {
    pub(super) fn tpms(&mut self) {
        let def = self.def;
        for tpm in &def.devices.tpms {
            let name = id(&tpm.info);
            let (chardev, back) = (format!("chrtpm-{name}"), format!("tpm-{name}"));
            let socket = list("socket").set("id", &chardev);
            let socket = match tpm.backend.kind {
                TpmKind::Emulator => socket.set("fd", self.emulator(tpm)),
                _ => {
                    let path = tpm.backend.source.as_ref().and_then(|s| s.path.as_deref()).unwrap_or_default();
                    socket.set("path", path)
                }
            };
            self.args.pair("-chardev", socket);
            self.args.pair("-tpmdev", list("emulator").set("id", &back).set("chardev", chardev));
            let device = tpm_device(tpm.model.unwrap_or_default()).unwrap_or_default();
            self.args.device(Props::device(device).set("tpmdev", back).set("id", name));
        }
    }

    /// Has the emulator run; gives QEMU's end of its control channel.
    fn emulator(&mut self, tpm: &Tpm) -> i32 {
        let fd = self.companion_fd();
        let site = &self.caps.site;
        let Some(state) = tpm_state_of(self.def, &site.state_dir) else { return fd };
        let Some(program) = site.swtpm.clone() else { return fd };
        let version = (tpm.backend.version == Some(TpmVersion::V2_0)).then_some("--tpm2");
        let setup: Vec<Companion> =
            site.swtpm_setup.iter().flat_map(|setup| setup_steps(setup, tpm, &state, version)).collect();
        let folders = if setup.is_empty() { vec![state.clone()] } else { Vec::new() };
        let (dir, control) = (format!("dir={},mode=0600", state.display()), format!("type=unixio,clientfd={CONTROL}"));
        let args = ["socket"].into_iter().chain(version);
        let mut args = words(args.chain(["--tpmstate", &dir, "--ctrl", &control, "--terminate"]));
        if let Some(level) = tpm.backend.debug {
            args.extend(["--log".to_owned(), format!("level={level}")]);
        }
        let secrets = secrets_of(tpm, &[KEY, MIGRATION_KEY]);
        if !secrets.is_empty() {
            let key = |option: &str, fd: RawFd| [option.to_owned(), format!("pwdfd={fd},mode={CIPHER}")];
            args.extend(key("--key", KEY).into_iter().chain(key("--migration-key", MIGRATION_KEY)));
        }
        let link = Link::Pair { its: CONTROL, qemus: fd };
        // Without its TPM a guest is better off than dead.
        let role = Role::Beside(Loss::Bear);
        let links = vec![link];
        let emulator = Companion { program, args, links, secrets, folders, ..Companion::new("swtpm", role) };
        self.companions.extend(setup);
        self.companions.push(emulator);
        fd
    }
}

/// What makes the first state with its keys, and at each start says which banks of registers are in use if the definition
/// does.
fn setup_steps(program: &Path, tpm: &Tpm, state: &Path, version: Option<&str>) -> Vec<Companion> {
    let step = |role: Role, at: &Path, what: &[&str]| {
        let at = at.display().to_string();
        let mut args = words(version.into_iter().chain(["--tpmstate", &at]).chain(what.iter().copied()));
        let secrets = secrets_of(tpm, &[KEY]);
        if !secrets.is_empty() {
            args.extend(words(["--pwdfile-fd", &KEY.to_string(), "--cipher", CIPHER]));
        }
        Companion { program: program.to_owned(), args, secrets, ..Companion::new("swtpm_setup", role) }
    };
    let name = state.file_name().unwrap_or_default().to_string_lossy();
    let work = state.with_file_name(format!(".{name}.making"));
    let maker = Role::Maker { work: work.clone(), made: state.to_owned(), within: SETUP };
    let mut steps = vec![step(maker, &work, &["--createek"])];
    let banks = tpm.backend.banks.as_ref().map(|banks| banks.names().join(","));
    if let Some(banks) = banks.filter(|names| !names.is_empty()) {
        steps.push(step(Role::Step { within: SETUP }, state, &["--reconfigure", "--pcr-banks", &banks]));
    }
    steps
}

/// What the state is encrypted with, if it is: once at each of these descriptors.
fn secrets_of(tpm: &Tpm, fds: &[RawFd]) -> Vec<Secret> {
    let Some(encryption) = &tpm.backend.encryption else { return Vec::new() };
    let content = || SecretContent::Kept(SecretName::Uuid(encryption.secret));
    fds.iter().map(|fd| Secret { fd: *fd, content: content() }).collect()
}

fn words<'a>(all: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    all.into_iter().map(str::to_owned).collect()
}

/// QEMU's name of the device.
pub fn tpm_device(model: TpmModel) -> Option<&'static str> {
    match model {
        TpmModel::Tis => Some("tpm-tis"),
        TpmModel::Crb => Some("tpm-crb"),
        TpmModel::Spapr | TpmModel::SpaprProxy => None,
    }
}
