//! Managed saves: a machine is saved in a file that virtd keeps, and the next start goes on from that.
//!
//! ```text
//!  ManagedSave  as Save, to <state>/saved/<uuid>.virtsave ─▶ told with `stopped saved`
//!  Start        what the file says ─▶ its checksum, the disks ─▶ loaded ─▶ marked as used ─▶ the guest goes on ─▶ the file goes
//!               ─▶ `started restored`
//!  dropped by   Start with force-boot, ManagedSaveRemove, a revert, Undefine with managed-save
//! ```
//!
//! A file that cannot be loaded stays, and is named to whoever wanted that. Before its guest can run an instruction it is marked
//! (`store/managed.rs`), and from then on it is no managed save any more, whoever is killed: no guest goes on from it twice.

use super::Domain;
use super::lifecycle::StartOptions;
use super::save::{Resumption, Target};
use super::state::State;
use crate::authz::{Action, Caller};
use crate::desk::Seat;
use crate::error::{Error, Result};
use crate::fail_point;
use crate::job::{Job, Ticket};
use crate::lock::lock;
use crate::restore::unread;
use crate::store::on_disk;
use crate::verb;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::domain::{DomainDef, Form};
use virt_model::driver::saved::{Compression, SavedFile, SavedState};
use virt_model::driver::snapshots::{FileChange, FileFate};
use virt_model::xml::{Limits, unreadable};

/// How a domain is saved for its next start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ManagedSaveOptions {
    /// What its CPUs do then: what they do now, if neither is wanted.
    pub then: Resumption,
    /// How its memory is packed.
    pub compression: Compression,
    /// It goes past the page cache.
    pub bypass_cache: bool,
    /// Cancel when the caller leaves the bus.
    pub cancel_on_disconnect: bool,
}

impl Domain {
    /// Saves the guest for the next start, and ends it. Returns when that is accepted; the ticket answers when the guest has
    /// ended. On failure it goes on as before, and nothing is left of the file.
    pub async fn managed_save(self: &Arc<Self>, caller: &Caller, options: ManagedSaveOptions) -> Result<Ticket> {
        self.accepted(caller, &verb::MANAGED_SAVE, async {
            self.allow(caller, verb::MANAGED_SAVE.action).await?;
            options.then.check()?;
            let change = self.change(caller, &verb::MANAGED_SAVE);
            let target = Target {
                file: self.shared.store.managed_save(self.uuid),
                given: None,
                compression: options.compression,
                bypass_cache: options.bypass_cache,
                managed: true,
                dump: false,
                memory_only: None,
                kept: None,
            };
            self.accept_save(change, &verb::MANAGED_SAVE, target, options.then, options.cancel_on_disconnect).await
        })
        .await
    }

    /// Removes the managed save: the next start boots. Error: `OperationInvalid` if there is none.
    pub async fn remove_managed_save(self: &Arc<Self>, caller: &Caller) -> Result<()> {
        self.short(caller, &verb::MANAGED_SAVE_REMOVE, self.drop_managed_save()).await
    }

    /// The configuration that the next start goes on with; with `secure` all that is secret in it. Errors: `OperationInvalid` if
    /// there is no managed save, and why it cannot be read.
    pub async fn managed_save_xml(&self, caller: &Caller, secure: bool) -> Result<String> {
        match secure {
            true => self.allow(caller, Action::ReadSecure).await?,
            false => self.allow(caller, verb::MANAGED_SAVE_XML.action).await?,
        }
        self.applies(&verb::MANAGED_SAVE_XML)?;
        let (_, def, seat) = self.read_managed_save(caller.uid).await?;
        Ok(seat.work(move || def.write(Form { inactive: true, secure, migratable: false })).await)
    }

    /// The file that a start with these options goes on from; `None`: it boots. `given`: it brings a configuration. Errors:
    /// `OperationInvalid` for what would be lost with the memory in that file, or does not go together with it.
    pub(super) fn goes_on_from(&self, given: bool, options: StartOptions) -> Result<Option<PathBuf>> {
        let name = {
            let state = lock(&self.state);
            if !state.managed_save || options.force_boot {
                return Ok(None);
            }
            state.refuse_over_managed_save(given)?;
            state.name.clone()
        };
        if options.reset_nvram {
            return Err(Error::OperationInvalid(format!(
                "domain '{name}' goes on from its managed save, whose firmware has its variables in memory already: leave out \
                 reset-nvram, or boot it (force-boot)"
            )));
        }
        Ok(Some(self.shared.store.managed_save(self.uuid)))
    }

    /// Refuses another start than the one that goes on from the managed save, if there is one.
    pub(super) fn refuse_over_managed_save(&self) -> Result<()> {
        lock(&self.state).refuse_over_managed_save(true)
    }

    /// What the file says, and the configuration in it, read for that user: with the seat that is to be kept as long as it is
    /// dealt with for them.
    async fn read_managed_save(&self, uid: u32) -> Result<(SavedState, DomainDef, Seat)> {
        let desk = &self.shared.desk;
        let place = desk.reads_file(uid).await;
        let file = self.shared.store.managed_save(self.uuid);
        let (saved, text) = self.saves()?.read_saved(SavedFile::At(file), Some(self.uuid)).await.map_err(unread)?;
        let seat = desk.seat(uid, &[&text]).await;
        let read = seat.work(move || DomainDef::parse_within(&text, Limits::STORED)).await;
        drop(place);
        let invalid = |why: &str| Error::InvalidArgument(format!("{}: {why}", saved.file.display()));
        let def = read.map_err(|findings| {
            invalid(&format!("the configuration in it cannot be used: {}", unreadable(&findings)))
        })?;
        match def.uuid == self.uuid {
            true => Ok((saved, def, seat)),
            false => Err(invalid(&format!("it holds the domain {}", def.uuid))),
        }
    }

    /// Refuses a file from which no start can go on: what is wrong with it is said before the start is accepted.
    pub(super) async fn can_go_on_from(&self, caller: &Caller, file: &Path) -> Result<()> {
        self.read_managed_save(caller.uid).await.map(drop).map_err(|error| kept(file, error))
    }

    /// Starts this domain from its managed save, `file`. On failure it is off, and the file stays.
    pub(super) async fn start_managed(
        self: &Arc<Self>,
        caller: &Caller,
        file: &Path,
        options: StartOptions,
        job: &Arc<Job>,
    ) -> Result<()> {
        let started = async {
            let (saved, mut def, _) = self.read_managed_save(caller.uid).await?;
            let name = self.name();
            self.is_of_its_driver(&def, &name)?;
            def.name = name;
            let word = verb::START.word;
            self.driver.learn_and_complete(&mut def).await.map_err(|e| self.driver_failed(word, e))?;
            let options = StartOptions { paused: options.paused || saved.paused, ..options };
            fail_point::reached();
            self.start_saved(caller, Arc::new(def), saved, options, word, job).await
        };
        match started.await {
            Ok(()) => Ok(()),
            Err(error) if self.has_gone_on().await => Err(used_up(file, error)),
            Err(error) => Err(kept(file, error)),
        }
    }

    /// A start has failed that may have brought a guest to run from the managed save: then that is forgotten.
    async fn has_gone_on(&self) -> bool {
        let (shared, uuid) = (self.shared.clone(), self.uuid);
        let used = on_disk(move || Ok(shared.store.managed_save_is_used(uuid))).await.unwrap_or(false);
        if used {
            self.managed_save_is_used().await;
            self.all_told().await.commit(|state| {
                state.managed_save = false;
                Vec::new()
            });
        }
        used
    }

    /// Removes the file of the managed save, if there is one, and tells that there is none any more. On failure both are as before.
    pub(super) async fn drop_managed_save(&self) -> Result<()> {
        if !lock(&self.state).managed_save {
            return Ok(());
        }
        self.remove_managed_save_file().await?;
        self.all_told().await.commit(|state| {
            state.managed_save = false;
            Vec::new()
        });
        Ok(())
    }

    /// The same, to be told with what it is part of: whoever calls this commits that.
    pub(super) async fn remove_managed_save_file(&self) -> Result<()> {
        if !lock(&self.state).managed_save {
            return Ok(());
        }
        let (shared, uuid) = (self.shared.clone(), self.uuid);
        on_disk(move || shared.store.remove_managed_save(uuid)).await
    }

    /// The same once a guest has gone on from it, or has been booted instead, and is there in any case.
    pub(super) async fn managed_save_is_used(&self) {
        if !lock(&self.state).managed_save {
            return;
        }
        fail_point::reached();
        if let Err(e) = self.remove_managed_save_file().await {
            let (uuid, name) = (self.uuid, self.name());
            tracing::error!(%uuid, name, "{e}; its guest has gone on from there, and it is not used again");
        }
    }

    /// What becomes of the file, where it goes with something else.
    pub(super) async fn managed_save_file(&self) -> Option<FileChange> {
        if !lock(&self.state).managed_save {
            return None;
        }
        let (shared, uuid) = (self.shared.clone(), self.uuid);
        let path = shared.store.managed_save(uuid);
        let bytes = on_disk(move || Ok(shared.store.managed_save_bytes(uuid))).await.ok().flatten()?;
        Some(FileChange { path, what: FileFate::Deleted, bytes })
    }
}

impl State {
    /// Refuses what needs a managed save where there is none.
    pub(super) fn has_managed_save(&self) -> Result<()> {
        match self.managed_save {
            true => Ok(()),
            false => Err(Error::OperationInvalid(format!("domain '{}' has no managed save", self.name))),
        }
    }

    /// Refuses a start with another configuration or memory (`other`) where there is a managed save, which would be of no use then.
    fn refuse_over_managed_save(&self, other: bool) -> Result<()> {
        match self.managed_save && other {
            true => Err(self.in_the_way("start it", "with something else than its managed save")),
            false => Ok(()),
        }
    }

    /// Refuses a rename of what is saved under the name that it has.
    pub(super) fn renames_no_managed_save(&self) -> Result<()> {
        match self.managed_save {
            true => Err(self.in_the_way("rename it", "while it has a managed save")),
            false => Ok(()),
        }
    }

    fn in_the_way(&self, deed: &str, how: &str) -> Error {
        Error::OperationInvalid(format!(
            "domain '{}': cannot {deed} {how}: let it go on from that first (Start), or remove that (ManagedSaveRemove)",
            self.name
        ))
    }
}

/// The failure of a start from `file`, which may have come so far that the guest ran.
fn used_up(file: &Path, error: Error) -> Error {
    let file = file.display();
    retold(error, |text| {
        format!(
            "{text}; its guest may have run for a moment, so its managed save {file} is not used again, and Start boots it"
        )
    })
}

/// The failure of a start from `file`, which is there still.
fn kept(file: &Path, error: Error) -> Error {
    let file = file.display();
    retold(error, |text: String| {
        let named = if text.contains(&*file.to_string()) { String::new() } else { format!(" {file}") };
        match text.contains("force-boot") {
            true if named.is_empty() => text,
            true => format!("{text}; its managed save{named} is kept"),
            false => format!("{text}; its managed save{named} is kept, and Start with force-boot drops it"),
        }
    })
}

/// The same failure in other words.
fn retold(error: Error, told: impl Fn(String) -> String) -> Error {
    match error {
        Error::InvalidArgument(text) => Error::InvalidArgument(told(text)),
        Error::OperationInvalid(text) => Error::OperationInvalid(told(text)),
        Error::OperationUnsupported(text) => Error::OperationUnsupported(told(text)),
        Error::ConfigUnsupported(text) => Error::ConfigUnsupported(told(text)),
        Error::StorageFailed(text) => Error::StorageFailed(told(text)),
        Error::InUse(text) => Error::InUse(told(text)),
        Error::HypervisorFailed { what, why } => Error::HypervisorFailed { what: told(what), why },
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_file_once_and_the_way_out() {
        let file = Path::new("/s/1.virtsave");
        for (text, told) in [
            (
                "no such machine",
                "no such machine; its managed save /s/1.virtsave is kept, and Start with force-boot drops it",
            ),
            (
                "/s/1.virtsave: cut off",
                "/s/1.virtsave: cut off; its managed save is kept, and Start with force-boot drops it",
            ),
            ("changed (force-boot)", "changed (force-boot); its managed save /s/1.virtsave is kept"),
            ("/s/1.virtsave: force-boot", "/s/1.virtsave: force-boot"),
        ] {
            assert_eq!(kept(file, Error::StorageFailed(text.into())).to_string(), told);
        }
    }
}
