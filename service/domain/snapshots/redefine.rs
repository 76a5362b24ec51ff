//! Restoring the record of a snapshot from its document: after a backup, a migration, an undefine.

use super::create::refused;
use super::plan::with_cpu;
use super::{CreateOptions, Domain};
use crate::authz::{Action, Caller};
use crate::domain::state::State;
use crate::error::{Error, Result};
use crate::job::Ticket;
use crate::lock::lock;
use crate::store::Record;
use crate::verb;
use std::sync::Arc;
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::domain::abi::Strictness;
use virt_model::driver::snapshots::MemoryMode;
use virt_model::snapshot::{Alignment, Request, SnapshotDef, SnapshotDoc, SnapshotState};
use virt_model::xml::Finding;

impl Domain {
    /// `caller` has been asked whether it may define.
    pub(super) async fn redefine_snapshot(
        self: &Arc<Self>,
        caller: &Caller,
        doc: SnapshotDoc,
        options: &CreateOptions,
    ) -> Result<(Option<String>, Ticket)> {
        self.host_can(&verb::CREATE_SNAPSHOT)?;
        let record = self.restored(doc.clone(), options)?;
        if let Ok(def) = &record.def {
            self.keepable(def.clone()).await?;
        }
        if record.def.as_ref().is_ok_and(|def| machines(def).any(DomainDef::has_native_arguments)) {
            self.allow(caller, Action::Native).await?;
        }
        let (name, options) = (record.name.clone(), options.clone());
        let job = self.change(caller, &verb::CREATE_SNAPSHOT).open(false)?;
        let ticket = job.run(async move |domain, _| {
            let record = domain.restored(doc, &options)?;
            domain.restore(record, options.current).await
        });
        Ok((Some(name), ticket))
    }

    async fn restore(self: &Arc<Self>, record: Record, current: bool) -> Result<()> {
        self.save_record(record.clone()).await?;
        if current {
            self.save_current(Some(record.name.clone())).await?;
        }
        self.all_told().await.commit(|state| {
            let (name, parent) = (record.name.clone(), record.def.as_ref().ok().and_then(|def| def.parent.clone()));
            let tree = state.snapshots.change();
            tree.put(&name, parent.as_deref(), Arc::new(record));
            if current {
                tree.set_current(Some(&name));
            }
            Vec::new()
        });
        Ok(())
    }

    /// The record that a document would restore, held to the rules. Changes nothing.
    pub(super) fn restored(&self, doc: SnapshotDoc, options: &CreateOptions) -> Result<Record> {
        let (mut def, uuid) = doc.clone().without_disks().map_err(Error::ConfigInvalid)?;
        let known = self.known()?;
        let state = lock(&self.state);
        state.still_here()?;
        let tree = &state.snapshots.tree;
        let name = def.name.clone();
        if let Some(parent) = &def.parent {
            if *parent == name {
                return Err(Error::InvalidArgument(format!("snapshot '{name}' cannot be its own parent")));
            }
            if tree.get(parent).is_none() {
                let text = format!("parent '{parent}' of '{name}' does not exist; redefine it first");
                return Err(Error::InvalidArgument(text));
            }
            if tree.is_below(parent, &name) {
                let text = format!("parent '{parent}' of '{name}' is below it: that would be a loop");
                return Err(Error::InvalidArgument(text));
            }
        }
        if options.disk_only && def.state != SnapshotState::DiskSnapshot {
            let text = format!("with 'disk-only' the state of '{name}' is disk-snapshot, not {}", def.state);
            return Err(Error::InvalidArgument(text));
        }
        let uuids: Vec<Uuid> = uuid.into_iter().chain(machines(&def).map(|domain| domain.uuid)).collect();
        if let Some(other) = uuids.iter().find(|uuid| **uuid != self.uuid) {
            let text = format!("snapshot '{name}' is of the domain {other}, not of '{}' ({})", state.name, self.uuid);
            return Err(Error::InvalidArgument(text));
        }
        // A revert would make each of them the domain's own.
        for machine in machines(&def) {
            self.is_of_its_driver(machine, &state.name)?;
        }
        state.keep_hidden(&mut def, &known).map_err(Error::ConfigInvalid)?;
        let order = match tree.get(&name) {
            Some(node) => {
                if let Ok(before) = &node.content.def {
                    replaces(before, &mut def)?;
                }
                node.content.order
            }
            None if def.domain.is_none() => {
                let text = format!("a new snapshot needs the full <domain> it was taken of, and '{name}' has none");
                return Err(Error::InvalidArgument(text));
            }
            None => {
                crate::registry::check_new_name("snapshot", &name)?;
                state.snapshots.room_for_another(&state.name)?;
                state.snapshots.next_order()
            }
        };
        align(&mut def, doc)?;
        Ok(Record::restored(def, order))
    }
}

impl State {
    /// Puts back in the configurations of a snapshot what was not shown of them: as its record has it, or without one, as
    /// the domain's configurations `known` have it.
    fn keep_hidden(&self, def: &mut SnapshotDef, known: &[Arc<DomainDef>]) -> Result<(), Vec<Finding>> {
        let before = self.snapshots.get(&def.name);
        let before = before.as_ref().and_then(|record| record.def.as_ref().ok());
        let of_domain: Vec<&DomainDef> = known.iter().map(|def| &**def).collect();
        if let Some(machine) = &mut def.domain {
            Arc::make_mut(machine)
                .keep_hidden(&as_before(before.and_then(|before| before.domain.as_deref()), &of_domain))?;
        }
        if let Some(machine) = &mut def.inactive {
            Arc::make_mut(machine)
                .keep_hidden(&as_before(before.and_then(|before| before.inactive.as_deref()), &of_domain))?;
        }
        Ok(())
    }
}

/// What is known of a configuration: its record alone, if there is one.
fn as_before<'a>(record: Option<&'a DomainDef>, others: &[&'a DomainDef]) -> Vec<&'a DomainDef> {
    record.map_or_else(|| others.to_vec(), |record| vec![record])
}

/// The configurations in it: what ran, and what was stored beside that.
fn machines(def: &SnapshotDef) -> impl Iterator<Item = &DomainDef> {
    def.domain.as_deref().into_iter().chain(def.inactive.as_deref())
}

/// Whether a restored record may take the place of one that is there.
fn replaces(before: &SnapshotDef, def: &mut SnapshotDef) -> Result<()> {
    let name = &def.name;
    let kind = |state: SnapshotState| match state {
        SnapshotState::DiskSnapshot => "disk-snapshot",
        state if state.is_online() => "online",
        _ => "offline",
    };
    if kind(before.state) != kind(def.state) {
        let (was, is) = (before.state, def.state);
        return Err(Error::InvalidArgument(format!("snapshot '{name}' is {was} and cannot become {is}")));
    }
    match (&before.domain, &def.domain) {
        (Some(source), Some(target)) => {
            let both = before.cpu.as_ref().zip(def.cpu.as_ref());
            let mut renamed = with_cpu(target, both.map(|both| both.1)).into_owned();
            renamed.name.clone_from(&source.name);
            let differences = with_cpu(source, both.map(|both| both.0)).compare_abi(&renamed, Strictness::Strict);
            if !differences.is_empty() {
                let all: Vec<String> = differences.iter().map(ToString::to_string).collect();
                let text = format!("snapshot '{name}': {} guest-visible differences: {}", all.len(), all.join("; "));
                return Err(Error::AbiIncompatible(text));
            }
        }
        (Some(_), None) => def.domain.clone_from(&before.domain),
        (None, _) => {}
    }
    def.merging.extend(before.merging.iter().cloned());
    if def.cookie.is_none() {
        def.cookie.clone_from(&before.cookie);
    }
    if def.cpu.is_none() {
        def.cpu.clone_from(&before.cpu);
    }
    if def.captured.is_empty() {
        def.captured.clone_from(&before.captured);
    }
    Ok(())
}

/// Lists every disk of the machine, in its order, each as the document says or as a new snapshot of that kind would have
/// it. Refuses a record that would act on nothing, and disks that the machine does not have.
fn align(def: &mut SnapshotDef, doc: SnapshotDoc) -> Result<()> {
    let Some(domain) = &def.domain else {
        def.disks = doc.record().map_err(Error::ConfigInvalid)?.0.disks;
        return Ok(());
    };
    let disk_only = def.state == SnapshotState::DiskSnapshot;
    let active = disk_only || def.state.is_online() || def.memory != MemoryMode::No;
    let request = Request { active, disk_only, live: false, restored: true };
    let aligned = Alignment::of(&doc, &def.name, domain, request).map_err(refused)?;
    let disks = &domain.devices.disks;
    let target = |name: &String| {
        let named = disks.iter().find(|disk| disk.path() == Some(name)).map(|disk| disk.target.dev.clone());
        named.unwrap_or_else(|| name.clone())
    };
    def.merging = def.merging.iter().map(target).collect();
    def.kept.iter_mut().for_each(|beside| beside.disk = target(&beside.disk));
    def.disks = aligned.disks;
    Ok(())
}
