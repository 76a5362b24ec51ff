//! Files in which machines were saved: domains that come from them, and the configurations in them.

use crate::Service;
use crate::authz::{Action, Caller, Subject};
use crate::desk::aside;
use crate::domain::{Domain, Resumption, StartOptions, absolute, path_or_given};
use crate::error::{Error, Result};
use crate::job::Ticket;
use crate::log;
use crate::verb;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use virt_model::domain::abi::Strictness;
use virt_model::domain::{DomainDef, Form};
use virt_model::driver::saved::{SavedFile, SavedMachines, SavedState};
use virt_model::driver::{DriverError, GivenFile};
use virt_model::xml::Limits;

/// How a machine is restored.
#[derive(Clone, Debug, Default)]
pub struct RestoreOptions {
    /// What its CPUs do: as was wanted when it was saved, if neither is wanted.
    pub then: Resumption,
    /// The configuration that it is to have, in place of the saved one; no guest would notice.
    pub xml: Option<String>,
    /// What the caller has open and the machine was saved in, in place of a file by its path.
    pub given: Option<Arc<GivenFile>>,
    /// Cancel when the caller leaves the bus.
    pub cancel_on_disconnect: bool,
}

impl Service {
    /// Starts the machine that was saved in a file: the domain of its uuid, or a transient one. Returns when that is accepted; the
    /// ticket answers when it runs, or stands ready. The file stays; on failure a domain that was not there before is not there
    /// after.
    pub async fn restore(&self, caller: &Caller, file: &str, options: RestoreOptions) -> Result<(Arc<Domain>, Ticket)> {
        let begun = Instant::now();
        let result = self.restore_inner(caller, file, options).await;
        if let Err(e) = &result {
            log::refused(caller, &verb::RESTORE, begun, e);
        }
        result
    }

    async fn restore_inner(
        &self,
        caller: &Caller,
        file: &str,
        options: RestoreOptions,
    ) -> Result<(Arc<Domain>, Ticket)> {
        self.allow(caller, &verb::RESTORE, &Subject::default()).await?;
        options.then.check()?;
        let from = match options.given {
            None => SavedFile::At(self.may_name(caller, file).await?),
            Some(given) => {
                path_or_given(file, true)?;
                self.shared.authority.check(caller, Action::Define, &Subject::default()).await?;
                SavedFile::Given(given)
            }
        };
        let (saved, kept) = self.read_saved(caller, from).await?;
        let xml = self.configuration_of(caller, kept, options.xml.as_deref(), "restore").await?.write(Form::STORED);
        let start = StartOptions {
            paused: options.then.stands(saved.paused),
            cancel_on_disconnect: options.cancel_on_disconnect,
            ..StartOptions::default()
        };
        // The file says which: it is as good as a document that was given.
        let (def, domain) = self.accept_to_start(caller, &xml, &[&verb::RESTORE, &verb::CREATE]).await?;
        let ticket = domain.launch_saved(caller, def, saved, start).await?;
        Ok((domain, ticket))
    }

    /// The configuration in a file in which a machine was saved; with `secure` all that is secret in it.
    pub async fn saved_xml(&self, caller: &Caller, file: &str, secure: bool) -> Result<String> {
        self.allow(caller, &verb::SAVED_XML, &Subject::default()).await?;
        if secure {
            self.shared.authority.check(caller, Action::ReadSecure, &Subject::default()).await?;
        }
        let file = self.may_name(caller, file).await?;
        let (_, kept) = self.read_saved(caller, SavedFile::At(file)).await?;
        let seat = self.shared.desk.seat(caller.uid, &[]).await;
        Ok(seat.work(move || kept.write(Form { inactive: true, secure, migratable: false })).await)
    }

    /// Has the machine in a file come back with another configuration, in which no guest would notice anything; what `xml` leaves
    /// out of what is secret stays. Returns when the file is on disk; on failure it is as it was.
    pub async fn set_saved_xml(&self, caller: &Caller, file: &str, xml: &str) -> Result<()> {
        let begun = Instant::now();
        let result = self.set_saved_xml_inner(caller, file, xml).await;
        if let Err(e) = &result {
            log::refused(caller, &verb::SET_SAVED_XML, begun, e);
        }
        result
    }

    async fn set_saved_xml_inner(&self, caller: &Caller, file: &str, xml: &str) -> Result<()> {
        self.allow(caller, &verb::SET_SAVED_XML, &Subject::default()).await?;
        let file = self.may_name(caller, file).await?;
        self.shared.images.refuse_below(&file, &self.shared.store.own_folders()).await?;
        let (saved, kept) = self.read_saved(caller, SavedFile::At(file)).await?;
        let (file, uuid) = (saved.file.clone(), kept.uuid);
        let taken =
            self.shared.images.take(&file, format!("a change of the configuration in {}", file.display())).await;
        let _taken = taken.map_err(|by| {
            let file = file.display();
            Error::InUse(format!("{file} is what {by} writes; wait until that has ended, and try again"))
        })?;
        let def = self.configuration_of(caller, kept, Some(xml), "save").await?;
        if def.has_native_arguments() {
            self.shared.authority.check(caller, Action::Native, &Subject::default()).await?;
        }
        let text = aside(move || def.write_readable(Form::STORED, Limits::ACCEPTED)).await.map_err(|why| {
            Error::OperationUnsupported(format!(
                "{}: the configuration could not be read again: {why}; give a smaller one",
                saved.file.display()
            ))
        })?;
        self.saves()?.reconfigure_saved(&saved, text).await.map_err(unread)?;
        tracing::info!(%uuid, caller_uid = caller.uid, "{} has another configuration", file.display());
        Ok(())
    }

    /// The path of a file of the host, before anything looks there, for a caller who may name such files in a configuration.
    async fn may_name(&self, caller: &Caller, file: &str) -> Result<PathBuf> {
        let file = absolute(file)?;
        self.shared.authority.check(caller, Action::Define, &Subject::default()).await?;
        Ok(file)
    }

    /// What a file says of the machine that was saved in it, and its configuration, for a caller who may name it.
    async fn read_saved(&self, caller: &Caller, from: SavedFile) -> Result<(SavedState, DomainDef)> {
        let place = self.shared.desk.reads_file(caller.uid).await;
        let (saved, text) = self.saves()?.read_saved(from, None).await.map_err(unread)?;
        let kept = self.configuration_in(caller, &saved, text).await?;
        drop(place);
        Ok((saved, kept))
    }

    fn saves(&self) -> Result<&dyn SavedMachines> {
        let found = self.shared.drivers.iter().find_map(|driver| driver.saved_machines());
        found.ok_or_else(|| Error::OperationUnsupported("no driver of this virtd saves machines".to_owned()))
    }

    /// The configuration that was saved, of its `text`.
    async fn configuration_in(&self, caller: &Caller, saved: &SavedState, text: String) -> Result<DomainDef> {
        let invalid = |e: &dyn std::fmt::Display| {
            Error::InvalidArgument(format!("{}: the configuration in it cannot be used: {e}", saved.file.display()))
        };
        let seat = self.shared.desk.seat(caller.uid, &[&text]).await;
        let read = seat.work(move || DomainDef::parse(&text)).await;
        read.map_err(|findings| invalid(&Error::ConfigInvalid(findings)))
    }

    /// The configuration that the machine is to have: the saved one (`kept`) or, if no guest would notice, `given`; by the name
    /// that the domain has today. `word`: what is to be done with it.
    async fn configuration_of(
        &self,
        caller: &Caller,
        kept: DomainDef,
        given: Option<&str>,
        word: &str,
    ) -> Result<DomainDef> {
        let today = self.get(kept.uuid).map(|domain| domain.name());
        let mut def = match given {
            None => kept,
            Some(given) => {
                let seat = self.shared.desk.seat(caller.uid, &[given]).await;
                let mut def = seat.read(given, DomainDef::parse).await.map_err(Error::ConfigInvalid)?;
                drop(seat);
                def.keep_hidden(&[&kept]).map_err(Error::ConfigInvalid)?;
                self.hold_alike(&kept, &mut def, today.as_deref(), word).await?;
                def
            }
        };
        if let Some(today) = today {
            def.name = today;
        }
        Ok(def)
    }

    /// Refuses a configuration in which the guest that was saved would notice something; a name that the domain has today is none.
    async fn hold_alike(&self, kept: &DomainDef, given: &mut DomainDef, today: Option<&str>, word: &str) -> Result<()> {
        let (Some(source), Some(target)) =
            (self.completed("saved", kept).await?, self.completed("given", given).await?)
        else {
            return Err(Error::ConfigUnsupported(format!(
                "no driver here completes domain '{}', so what it was cannot be held against the document",
                kept.name
            )));
        };
        let mut target = target;
        if today == Some(target.name.as_str()) {
            target.name.clone_from(&source.name);
        }
        let differences = source.compare_abi(&target, Strictness::Strict);
        if differences.is_empty() {
            return Ok(());
        }
        let all: Vec<String> = differences.iter().map(ToString::to_string).collect();
        let text = format!(
            "cannot {word} domain '{}' with the document given for it: the guest would notice {} differences: {}",
            kept.name,
            all.len(),
            all.join("; ")
        );
        Err(Error::AbiIncompatible(text))
    }
}

/// Why a file is not taken for a saved machine.
pub(crate) fn unread(error: DriverError) -> Error {
    match error {
        DriverError::Argument(why) => Error::InvalidArgument(why),
        DriverError::Unsupported(why) => Error::OperationUnsupported(why),
        DriverError::Storage(why) => Error::StorageFailed(why),
        DriverError::TimedOut(why) => Error::TimedOut(why),
        DriverError::NoSpace(why) => Error::NoSpace(why),
        DriverError::Refused(why) => Error::OperationInvalid(why),
        other => Error::Internal(other.to_string()),
    }
}
