//! The driver as the service knows it: each deed is done by the module that is named in it.

use super::capabilities::{Capabilities, Host, default_emulator};
use super::changes::SYSFS;
use super::instance::Leavings;
use super::launch::MONITOR_FD;
use super::{
    Delivery, Judged, QemuDriver, capabilities, check, command, declared, domain_capabilities, emulator,
    ends_on_reboot, find, given, guests_dir, hostdev, make, names_emulator, needs, our_body, stats,
};
use crate::host::files::{Seen, What};
use crate::host::storage;
use crate::host::workers::Errand;
use crate::host::workers::blocking;
use async_trait::async_trait;
use std::any::Any;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::oneshot;
use uuid::Uuid;
use virt_model::device::Disk;
use virt_model::domain::DomainDef;
use virt_model::driver::backup::Backups;
use virt_model::driver::block_jobs::BlockJobs;
use virt_model::driver::checkpoints::Checkpoints;
use virt_model::driver::saved::SavedMachines;
use virt_model::driver::snapshots::Snapshots;
use virt_model::driver::stats::{GroupStats, StatQuestion};
use virt_model::driver::{
    Accepted, Adjustment, Attachment, Detachment, DomainEnd, Driver, DriverError, GivenFile, Instance, Launch,
    MachineChoice, Reconnect, Reconnected, Removable, Running, StoredFile,
};
use virt_model::secret::SecretUser;
use virt_model::xml::{Finding, FindingKind, shorten};

#[async_trait]
impl Driver for QemuDriver {
    fn name(&self) -> &'static str {
        "qemu"
    }

    fn types(&self) -> &'static [&'static str] {
        &["qemu", "kvm"]
    }

    async fn learn(&self, def: &DomainDef) {
        // Why it failed is known from now on, and told by whatever needs to know the emulator.
        self.learnt_for(def).await;
    }

    async fn complete(&self, def: &mut DomainDef) -> Result<(), DriverError> {
        let caps = self.capabilities_for(def).await;
        self.complete_for(def, &caps)
    }

    async fn learn_and_complete(&self, def: &mut DomainDef) -> Result<(), DriverError> {
        let caps = self.learnt_for(def).await;
        self.complete_for(def, &caps)
    }

    async fn check(&self, def: &DomainDef) -> Vec<Finding> {
        let caps = self.capabilities_for(def).await;
        let mut findings = check::check(def, &caps);
        let (inner, here) = (self.0.clone(), def.clone());
        findings.extend(blocking(move || inner.missing_on_host(&here)).await.unwrap_or_default());
        findings
    }

    async fn look(&self, def: &DomainDef) -> Result<Vec<Finding>, DriverError> {
        let mut findings = declared::objections(&self.0.workers, def).await?;
        if let Some((nvram, path)) = def.os.nvram.as_ref().and_then(|nvram| Some((nvram, nvram.path.clone()?))) {
            let errand = Errand::new(def.uuid, &path);
            let why = self.0.workers.run(errand, move |_| Ok(make::no_variables(Path::new(&path)))).await?;
            findings.extend(why.map(|why| Finding::invalid(&nvram.at, why)));
        }
        Ok(findings)
    }

    async fn has_files(&self, def: &DomainDef, restored: bool) -> Result<(), DriverError> {
        let caps = self.capabilities_for(def).await;
        if let Some(why) = &caps.absent {
            return Err(DriverError::Storage(why.clone()));
        }
        let (lacks, command) = self.lacks_files(def, caps, restored).await?;
        command.map_err(DriverError::Config)?;
        if let Some(lack) = lacks.into_iter().next() {
            return Err(lack.error());
        }
        if let Some((_, lack)) = self.lacks_secrets(def).await?.into_iter().next() {
            return Err(lack);
        }
        // What runs until a revert ends it may have the ports.
        if restored {
            return Ok(());
        }
        let here = def.clone();
        let taken = blocking(move || needs::taken_ports(&here)).await?;
        taken.into_iter().next().map_or(Ok(()), |port| Err(DriverError::Refused(port.message)))
    }

    async fn can_start(&self, def: &DomainDef) -> Result<Accepted, DriverError> {
        let binary = emulator(def).await;
        // Most often the emulator is what it was: the definition is looked at while that is seen.
        let before = self.0.prober.last_known(&binary);
        let passes = async {
            match &before {
                Some(caps) => Some(self.passes(def, caps.clone()).await),
                None => None,
            }
        };
        let (asked, passes) = tokio::join!(self.0.prober.probe(def.uuid, &binary), passes);
        let caps = match &asked {
            Ok(asked) => asked.capabilities.clone(),
            // Why it failed is told by the check.
            Err(_) => self.0.prober.known(&binary).await,
        };
        let passed = match passes.filter(|_| before.is_some_and(|before| Arc::ptr_eq(&before, &caps))) {
            Some(passed) => passed?,
            None => self.passes(def, caps).await?,
        };
        if let Some((_, lack)) = self.lacks_secrets(def).await?.into_iter().next() {
            return Err(lack);
        }
        let judged = asked.map(|asked| Judged { by: names_emulator(def), asked, passed });
        Ok(Accepted(judged.ok().map(|judged| Box::new(judged) as Box<dyn Any + Send + Sync>)))
    }

    async fn unmet(&self, def: &DomainDef) -> Result<Vec<Finding>, DriverError> {
        let caps = self.capabilities_for(def).await;
        // What keeps a command from being built is told by `check`.
        let (lacks, _) = self.lacks_files(def, caps, false).await?;
        let tree = def.tree();
        let mut findings: Vec<Finding> = lacks.into_iter().map(|lack| lack.finding(&tree)).collect();
        let here = def.clone();
        findings.extend(blocking(move || needs::taken_ports(&here)).await?);
        let lacks = self.lacks_secrets(def).await?.into_iter();
        let told = |(user, lack): (SecretUser, DriverError)| {
            Finding::anywhere(FindingKind::Unsupported, user.path(), format!("{user}: {lack}"))
        };
        findings.extend(lacks.map(told));
        Ok(findings)
    }

    async fn native(&self, def: &DomainDef, format: &str) -> Result<Vec<String>, DriverError> {
        if format != "qemu-argv" {
            return Err(DriverError::Unsupported(format!(
                "the format '{}' is not known here: ask for 'qemu-argv'",
                shorten(format)
            )));
        }
        let caps = self.capabilities_for(def).await;
        if let Some(why) = &caps.absent {
            return Err(DriverError::Storage(why.clone()));
        }
        let runtime_dir = guests_dir(def);
        let sandbox = !self.0.privileges.are_ours();
        let place = command::Place::now(&runtime_dir, MONITOR_FD, sandbox);
        let mut here = def.clone();
        let here = blocking(move || {
            // What is not plugged in is shown by its name.
            let places = hostdev::find_usb(&mut here, Path::new(SYSFS), false).unwrap_or_default();
            places.written_into(&here)
        });
        let command = check::checked_command(&here.await?, &caps, &place).map_err(DriverError::Config)?;
        Ok([vec![command.program.to_string_lossy().into_owned()], command.all_args()].concat())
    }

    async fn belongings(&self, def: &DomainDef) -> Vec<PathBuf> {
        let all = self.0.belongings(def);
        let (named, errand) = (all.clone(), Errand::new(def.uuid, "the firmware variables"));
        let tpm = command::tpm_state(&self.0.state_dir, def.uuid);
        let is_there = move |path: &PathBuf| {
            let seen = Seen::at(path);
            seen.named && (*path == tpm || seen.what != What::Folder)
        };
        let there = move |_: &_| Ok(named.into_iter().filter(is_there).collect());
        self.0.workers.run(errand, there).await.unwrap_or(all)
    }

    async fn remove_belongings(&self, def: &DomainDef, end: DomainEnd) -> Result<(), DriverError> {
        let kept = def.devices.tpms.iter().any(|tpm| tpm.backend.persistent_state == Some(true));
        let gone = match end {
            DomainEnd::Undefined => self.0.belongings(def),
            DomainEnd::Transient if kept => return Ok(()),
            DomainEnd::Transient => vec![command::tpm_state(&self.0.state_dir, def.uuid)],
        };
        let wary = !self.0.privileges.are_ours();
        let tpm = command::tpm_state(&self.0.state_dir, def.uuid);
        // What a definition names is a plain file, or is not removed.
        let remove = move |path: &PathBuf| match *path == tpm {
            true => make::remove(path, wary),
            false => make::remove_plain(path, wary),
        };
        let (inner, machine) = (self.0.clone(), def.uuid);
        let errand = Errand::new(machine, "the firmware variables");
        let removed = move |_: &_| {
            gone.iter().try_for_each(remove)?;
            inner.privileges.forget(machine)
        };
        self.0.workers.run(errand, removed).await
    }

    async fn storage(&self, def: &DomainDef, files: &[PathBuf]) -> Result<Vec<Removable>, DriverError> {
        let (files, wary) = (files.to_vec(), !self.0.privileges.are_ours());
        let errand = Errand::new(def.uuid, "the images of the machine");
        self.0.workers.run(errand, move |_| Ok(files.iter().map(|file| storage::judge(file, wary)).collect())).await
    }

    async fn remove_storage(&self, def: &DomainDef, file: &StoredFile) -> Result<(), DriverError> {
        let (file, wary) = (file.clone(), !self.0.privileges.are_ours());
        let errand = Errand::new(def.uuid, file.path.display().to_string()).of(file.bytes);
        self.0.workers.run(errand, move |_| storage::remove(&file, wary)).await
    }

    async fn capabilities(&self) -> Result<String, DriverError> {
        let (host, own) = blocking(|| {
            let host = Host::read();
            let own = default_emulator(&host.arch);
            (host, own)
        })
        .await?;
        let caps = self.0.prober.known(&own).await;
        let found: Vec<Arc<Capabilities>> = Some(caps).into_iter().filter(|caps| caps.absent.is_none()).collect();
        Ok(capabilities::document(&host, &found.iter().map(Arc::as_ref).collect::<Vec<_>>()))
    }

    async fn domain_capabilities(&self, wanted: &MachineChoice) -> Result<String, DriverError> {
        let arch = wanted.arch.clone().unwrap_or_else(|| std::env::consts::ARCH.to_owned());
        let known = ["x86_64", "i686"];
        if !known.contains(&&*arch) {
            let why = format!("the QEMU driver runs machines of {}, not of '{}'", known.join(" and "), shorten(&arch));
            return Err(DriverError::NotPossible(why));
        }
        let own = arch.clone();
        let caps = self.0.prober.known(&blocking(move || default_emulator(&own)).await?).await;
        if let Some(why) = &caps.absent {
            return Err(DriverError::NotPossible(why.clone()));
        }
        let fastest = if caps.kvm.is_ok() { "kvm" } else { "qemu" };
        let kind = wanted.kind.clone().unwrap_or_else(|| fastest.to_owned());
        if !self.types().contains(&&*kind) {
            let why = format!("the QEMU driver runs {}, not '{}'", self.types().join(" and "), shorten(&kind));
            return Err(DriverError::NotPossible(why));
        }
        if let Some(machine) = wanted.machine.as_ref().filter(|machine| caps.machine(machine).is_none()) {
            let (machine, binary) = (shorten(machine), caps.binary.display());
            return Err(DriverError::NotPossible(format!("{binary} has no machine '{machine}'")));
        }
        // One at a time: each takes a while, and is then known.
        let mut offers = self.0.offers.clone().lock_owned().await;
        let machine = wanted.machine.clone();
        let told = blocking(move || {
            let offer = domain_capabilities::Offer::new(&caps, &kind, &arch, machine.as_deref())?;
            let key = (arch.clone(), kind.clone(), offer.machine().to_owned());
            if let Some((_, document)) = offers.get(&key).filter(|(of, _)| Arc::ptr_eq(of, &caps)) {
                return Ok(document.clone());
            }
            let document = offer.document();
            offers.insert(key, (caps.clone(), document.clone()));
            Ok(document)
        });
        told.await?
    }

    async fn start(&self, launch: Launch) -> Result<Running, DriverError> {
        // In a task of its own: it cleans up after itself even if nobody waits for it any more.
        let cancel = launch.cancel.child_token();
        let given_up = cancel.clone().drop_guard();
        let (hand_over, taken) = oneshot::channel();
        let driver = self.clone();
        tokio::spawn(async move {
            let made = driver.make(launch, cancel).await;
            let _ = hand_over.send(made.map(|(instance, live)| Delivery(Some((Arc::new(instance), live)))));
        });
        let made = taken.await.unwrap_or_else(|_| Err(DriverError::Internal("the start was cut off".into())));
        given_up.disarm();
        made?.accept()
    }

    async fn judge_image(&self, machine: Uuid, disk: &Disk, image: &Arc<GivenFile>) -> Result<String, DriverError> {
        given::judge(&self.0.workers, machine, disk, image).await
    }

    async fn place_device(
        &self,
        guest: &dyn Instance,
        before: &DomainDef,
        def: &mut DomainDef,
    ) -> Result<String, DriverError> {
        self.place_one(our_body(guest)?, before, def).await
    }

    async fn attach_device(
        &self,
        guest: &dyn Instance,
        def: &mut DomainDef,
        device: Attachment<'_>,
    ) -> Result<(), DriverError> {
        self.plug(our_body(guest)?, def, device, Path::new(SYSFS)).await
    }

    async fn detach_device(&self, guest: &dyn Instance, device: Detachment<'_>) -> Result<(), DriverError> {
        self.unplug(our_body(guest)?, device).await
    }

    async fn is_detached(&self, guest: &dyn Instance, def: &DomainDef, alias: &str) -> Result<bool, DriverError> {
        self.has_gone(our_body(guest)?, def, alias).await
    }

    async fn adjust(
        &self,
        guest: &dyn Instance,
        before: &DomainDef,
        def: &mut DomainDef,
        what: &Adjustment,
    ) -> Result<(), DriverError> {
        self.adjust_guest(our_body(guest)?, before, def, what).await
    }

    async fn look_at(&self, guest: &dyn Instance, def: &mut DomainDef, what: &Adjustment) -> Result<(), DriverError> {
        self.look_at_guest(our_body(guest)?, def, what).await
    }

    async fn stats(
        &self,
        def: &DomainDef,
        guest: Option<&dyn Instance>,
        asked: StatQuestion,
    ) -> Result<GroupStats, DriverError> {
        match guest {
            Some(guest) => stats::of_guest(&self.0.workers, our_body(guest)?, def, asked.group).await,
            None => stats::at_rest(&self.0.workers, def, asked).await,
        }
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }

    fn checkpoints(&self) -> Option<&dyn Checkpoints> {
        Some(self)
    }

    fn block_jobs(&self) -> Option<&dyn BlockJobs> {
        Some(self)
    }

    fn backups(&self) -> Option<&dyn Backups> {
        Some(self)
    }

    fn saved_machines(&self) -> Option<&dyn SavedMachines> {
        Some(self)
    }

    async fn reconnect(&self, found: Reconnect) -> Result<Option<Reconnected>, DriverError> {
        let (uuid, runtime_dir, claims) = (found.live.uuid, found.runtime_dir.clone(), self.0.claims.clone());
        let ledger = self.0.privileges.ledger().cloned();
        let leavings = Leavings { uuid, runtime_dir, ledger, claims, own_network: self.0.own_network.clone() };
        let ends_on_reboot = ends_on_reboot(&found.live);
        find::Search { found, ends_on_reboot, leavings }.run().await
    }
}
