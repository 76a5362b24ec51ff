//! Deleting snapshots: deepest first, so that what is left is always a tree that holds.

use super::plan::{Plan, told};
use super::{Domain, DomainJournal};
use crate::authz::Caller;
use crate::domain::config::Update;
use crate::domain::lifecycle::Creation;
use crate::domain::state::State;
use crate::error::{Error, Result};
use crate::images;
use crate::job::{Job, Ticket};
use crate::lock::lock;
use crate::store::{Current, Deed, Record};
use crate::verb;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::device::disk::BackingStore;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;
use virt_model::driver::snapshots::{
    DeletePlan, DiskMode, FileChange, Journal as _, Machine, Replaced, Siblings, Unfinished,
};
use virt_model::snapshot::SnapshotDef;

/// What is deleted.
#[derive(Clone, Copy, Debug, Default)]
pub struct DeleteOptions {
    /// All below it, too.
    pub children: bool,
    /// All below it, not itself.
    pub children_only: bool,
    /// The records alone; images stay as they are.
    pub metadata_only: bool,
    /// Cancel when the caller leaves the bus.
    pub cancel_on_disconnect: bool,
}

impl Domain {
    /// Deletes a snapshot; the ticket answers when that is done. Each one that is gone is gone for good, also if a later
    /// one fails.
    pub async fn delete_snapshot(
        self: &Arc<Self>,
        caller: &Caller,
        name: &str,
        options: DeleteOptions,
    ) -> Result<Ticket> {
        self.accepted(caller, &verb::DELETE, async {
            self.snapshot(name)?;
            self.allow_snapshot(caller, verb::DELETE.action, name).await?;
            let change = self.change(caller, &verb::DELETE);
            let checked = change.has_turn() && self.is_whole();
            self.may_delete(name, options).await?;
            let name = name.to_owned();
            let job = change.open(options.cancel_on_disconnect)?;
            Ok(job.run(async move |domain, job| {
                if !checked {
                    domain.may_delete(&name, options).await?;
                }
                domain.delete_all(&name, options, job).await
            }))
        })
        .await
    }

    /// What a deletion would do, as far as that can be told, and why it would be refused. Changes nothing.
    pub async fn check_delete(
        &self,
        caller: &Caller,
        name: &str,
        options: DeleteOptions,
    ) -> Result<(Plan, Option<Error>)> {
        self.snapshot(name)?;
        self.allow_snapshot(caller, verb::CHECK_DELETE.action, name).await?;
        Ok(self.plan_delete(name, options).await.unwrap_or_else(|refusal| (Plan::default(), Some(refusal))))
    }

    async fn may_delete(&self, name: &str, options: DeleteOptions) -> Result<()> {
        self.plan_delete(name, options).await?.1.map_or(Ok(()), Err)
    }

    async fn plan_delete(&self, name: &str, options: DeleteOptions) -> Result<(Plan, Option<Error>)> {
        let names = self.deleted_together(name, options)?;
        if options.metadata_only {
            return Ok((Plan::default(), None));
        }
        self.is_not_backed_up()?;
        let (files, refusals) = self.plan_deletes(&names).await?;
        Ok((Plan { files: told(&files), ..Plan::default() }, refusals.into_iter().next()))
    }

    /// What the deletion of all these with their data would do, in this order, and all that it would be refused for.
    pub(in crate::domain) async fn plan_deletes(&self, names: &[String]) -> Result<(Vec<FileChange>, Vec<Error>)> {
        let (mut files, mut refusals) = (Vec::new(), Vec::new());
        refusals.extend(self.disks_are_idle(None).err());
        let machine = self.machine().await?;
        for one in names {
            match self.plan_one(one, names, &machine).await {
                Ok(plan) => {
                    files.extend(plan.files);
                    refusals.extend(plan.refused.map(|e| self.not_deleted(one, e)));
                }
                Err(e) => refusals.push(e),
            }
        }
        Ok((files, refusals))
    }

    /// All of them, in the order in which they can be deleted one by one.
    pub(in crate::domain) fn all_deepest_first(&self) -> Vec<String> {
        let state = lock(&self.state);
        let tree = &state.snapshots.tree;
        let roots = tree.iter().filter(|node| node.parent.is_none());
        roots.flat_map(|root| tree.descendants(&root.name).into_iter().chain([root.name.clone()])).collect()
    }

    async fn plan_one(&self, name: &str, deleted_together: &[String], machine: &Machine) -> Result<DeletePlan> {
        let (record, def) = self.usable_snapshot(name)?;
        let (kept, siblings) = (self.kept(&record, &def, machine), self.siblings(name, deleted_together, machine)?);
        let plan = self.takes_snapshots()?.check_delete(machine, &kept, &siblings).await;
        let plan = plan.map_err(|e| self.not_deleted(name, e))?;
        let gone: Vec<PathBuf> = plan.files.iter().map(|file| file.path.clone()).collect();
        self.nobody_else_needs(name, &plan.written, images::Fate::Written).await?;
        self.nobody_else_needs(name, &gone, images::Fate::Removed).await?;
        Ok(plan)
    }

    /// Refuses to write or remove files that another machine stands on.
    async fn nobody_else_needs(&self, name: &str, files: &[PathBuf], fate: images::Fate) -> Result<()> {
        let deed = format!("cannot delete snapshot '{name}' of domain '{}'", self.name());
        let remedy =
            "make those images whole (qemu-img rebase -b \"\"), undefine what needs them, or delete with metadata-only";
        self.shared.images.refuse_in_use(&deed, files, fate, Some(self.uuid), remedy).await
    }

    /// Which ones go, in order.
    fn deleted_together(&self, name: &str, options: DeleteOptions) -> Result<Vec<String>> {
        if options.children && options.children_only {
            return Err(Error::InvalidArgument("'children' and 'children-only' exclude each other".to_owned()));
        }
        let state = lock(&self.state);
        let tree = &state.snapshots.tree;
        tree.get(name).ok_or_else(|| state.no_snapshot(name))?;
        let mut names = if options.children || options.children_only { tree.descendants(name) } else { Vec::new() };
        if !options.children_only {
            names.push(name.to_owned());
        }
        Ok(names)
    }

    pub(super) fn siblings(&self, name: &str, deleted_together: &[String], machine: &Machine) -> Result<Siblings> {
        let stored = if self.live().is_some() { self.stored()? } else { None };
        Ok(Siblings {
            others: self.others(name, machine),
            unreadable: self.has_unreadable(),
            stored,
            keep: Vec::new(),
            deleted_together: deleted_together.iter().filter(|other| *other != name).cloned().collect(),
        })
    }

    async fn delete_all(self: &Arc<Self>, name: &str, options: DeleteOptions, job: Arc<Job>) -> Result<()> {
        let names = self.deleted_together(name, options)?;
        self.delete_these(&names, options.metadata_only, &job).await
    }

    /// Deletes these, one by one: each one that is gone is gone for good.
    pub(in crate::domain) async fn delete_these(
        self: &Arc<Self>,
        names: &[String],
        metadata_only: bool,
        job: &Arc<Job>,
    ) -> Result<()> {
        // A transient domain must not go with its guest while its images are half-way.
        let _stay = Creation::begin(self)?;
        for one in names {
            if job.cancel_token().is_cancelled() {
                return Err(Error::Cancelled(format!(
                    "deleting snapshots of '{}' was cancelled; '{one}' and what is above it are still there",
                    self.name()
                )));
            }
            let journal = self.journal(Deed::Delete { name: one.clone() }, job);
            let mut replaced = Vec::new();
            if !metadata_only {
                journal.begin().await?;
                let machine = self.machine().await?;
                let (record, def) = self.usable_snapshot(one)?;
                let (kept, siblings) = (self.kept(&record, &def, &machine), self.siblings(one, names, &machine)?);
                let deleted = self.takes_snapshots()?.delete(&machine, &kept, &siblings, journal.clone()).await;
                replaced = match deleted {
                    Ok(replaced) => replaced,
                    Err(unfinished) => return Err(self.deletion_failed(one, unfinished, &journal).await),
                };
            }
            self.snapshot_deleted(one, &replaced, &journal).await?;
        }
        Ok(())
    }

    /// It is neither gone nor as it was: configurations follow what is merged, and it can only be deleted again.
    pub(super) async fn deletion_failed(
        self: &Arc<Self>,
        name: &str,
        unfinished: Unfinished,
        journal: &Arc<DomainJournal>,
    ) -> Error {
        let Unfinished { error, replaced, merging } = unfinished;
        let kept = async {
            self.mark_merging(&Deed::Delete { name: name.to_owned() }, &merging).await?;
            self.follow_merged(name, &replaced, journal).await
        };
        match kept.await {
            Ok(()) => journal.end_after_failure(&error).await,
            Err(why) => {
                tracing::error!(uuid = %self.uuid, name, error = %why, "a deletion is half done; it is finished before anything else is")
            }
        }
        self.not_deleted(name, error)
    }

    /// Every configuration that named a file which is no more names what holds its content.
    async fn follow_merged(
        self: &Arc<Self>,
        name: &str,
        replaced: &[Replaced],
        journal: &Arc<DomainJournal>,
    ) -> Result<()> {
        if replaced.is_empty() {
            return Ok(());
        }
        self.replace_in_configurations(replaced).await?;
        journal.step("configurations");
        let changed = self.records_without(name, replaced, false);
        for record in &changed {
            self.save_record(record.clone()).await?;
            journal.step("another record");
        }
        self.all_told().await.commit(|state| {
            put(state, changed);
            Vec::new()
        });
        Ok(())
    }

    /// The frozen files of these disks are about to be written, or have been.
    pub(super) async fn mark_merging(&self, deed: &Deed, targets: &[String]) -> Result<()> {
        let Deed::Delete { name } = deed else { return Ok(()) };
        let record = self.snapshot(name)?;
        let Ok(def) = &record.def else { return Ok(()) };
        let mut def = def.clone();
        def.merging.extend(targets.iter().cloned());
        if Ok(&def) == record.def.as_ref() {
            return Ok(());
        }
        let record = Record { def: Ok(def), ..Record::clone(&record) };
        self.save_record(record.clone()).await?;
        self.all_told().await.commit(|state| {
            put(state, vec![record]);
            Vec::new()
        });
        Ok(())
    }

    /// A deletion that was cut off, and of which nobody can tell how far it came.
    pub(super) async fn mark_all_merging(&self, deed: &Deed) {
        let Deed::Delete { name } = deed else { return };
        let Ok((_, def)) = self.usable_snapshot(name) else { return };
        let outside = def.disks.iter().filter(|part| matches!(part.mode, DiskMode::External { .. }));
        let targets: Vec<String> = outside.map(|part| part.target.clone()).collect();
        if let Err(error) = self.mark_merging(deed, &targets).await {
            tracing::error!(uuid = %self.uuid, name, %error, "do not revert to this snapshot");
        }
    }

    /// Its data is gone: what remains is to say so, in every configuration that named it.
    pub(super) async fn snapshot_deleted(
        self: &Arc<Self>,
        name: &str,
        replaced: &[Replaced],
        journal: &Arc<DomainJournal>,
    ) -> Result<()> {
        if !replaced.is_empty() {
            self.replace_in_configurations(replaced).await?;
            journal.step("configurations");
        }
        let changed = self.records_without(name, replaced, true);
        let current = {
            let state = lock(&self.state);
            let tree = &state.snapshots.tree;
            let parent = tree.get(name).and_then(|node| node.parent.clone());
            (tree.current() == Some(name)).then_some(Current(parent))
        };
        journal.end_with_gone(changed.clone(), current, name.to_owned()).await?;
        self.all_told().await.commit(|state| {
            put(state, changed);
            state.snapshots.change().remove(name);
            Vec::new()
        });
        if !replaced.is_empty() {
            self.looks_at_checkpoints();
        }
        Ok(())
    }

    /// The other records, as far as they change: without files that are no more, and, if it is `gone`, with another parent.
    fn records_without(&self, name: &str, replaced: &[Replaced], gone: bool) -> Vec<Record> {
        let state = lock(&self.state);
        let tree = &state.snapshots.tree;
        let parent = tree.get(name).and_then(|node| node.parent.clone());
        let mut changed = Vec::new();
        for node in tree.iter().filter(|node| node.name != name) {
            let Ok(def) = &node.content.def else { continue };
            let mut def = def.clone();
            def.parent.clone_from(&node.parent);
            if gone && node.parent.as_deref() == Some(name) {
                def.parent.clone_from(&parent);
            }
            replace_in_snapshot(&mut def, replaced);
            if Ok(&def) != node.content.def.as_ref() {
                changed.push(Record { def: Ok(def), ..Record::clone(&node.content) });
            }
        }
        changed
    }

    async fn replace_in_configurations(&self, replaced: &[Replaced]) -> Result<()> {
        let (live, stored) = self.configurations()?;
        let mended = |def: Option<Arc<DomainDef>>| {
            let def = def?;
            let mut mended = DomainDef::clone(&def);
            replace_in(&mut mended, replaced);
            (mended != *def).then(|| Arc::new(mended))
        };
        self.put_configurations(mended(live), mended(stored), Update::Part).await
    }

    fn not_deleted(&self, name: &str, error: DriverError) -> Error {
        self.driver_failed(&format!("delete snapshot '{name}' of"), error)
    }
}

/// Records that have changed.
fn put(state: &mut State, changed: Vec<Record>) {
    let tree = state.snapshots.change();
    for record in changed {
        if let Some(content) = tree.content_mut(&record.name.clone()) {
            *content = Arc::new(record);
        }
    }
}

/// A file that is no more is not to be named: what stood on it stands on what holds its content.
fn replace_in(def: &mut DomainDef, replaced: &[Replaced]) {
    for one in replaced {
        for disk in def.devices.disks.iter_mut().filter(|disk| disk.target.dev == one.target) {
            if disk.path().map(Path::new) == Some(&one.gone) {
                if !disk.give_way() {
                    disk.backing = None;
                    // A volume by that name is another file.
                    disk.is_only_its_file();
                    if let Some(source) = &mut disk.source {
                        source.file = Some(one.by.to_string_lossy().into_owned());
                    }
                    if let Some(format) = &one.format {
                        disk.driver.get_or_insert_default().format = Some(format.clone());
                    }
                }
                continue;
            }
            forget_layer(disk.backing.as_mut(), one);
        }
    }
}

/// Takes a layer out of a chain.
fn forget_layer(layer: Option<&mut Box<BackingStore>>, gone: &Replaced) {
    let Some(layer) = layer else { return };
    let path = layer.source.as_ref().and_then(|source| source.path(layer.kind.unwrap_or_default()));
    if path.map(Path::new) == Some(&gone.gone) {
        match layer.backing.take() {
            Some(below) => *layer = below,
            None => {
                if let Some(source) = &mut layer.source {
                    source.file = Some(gone.by.to_string_lossy().into_owned());
                }
            }
        }
        return;
    }
    forget_layer(layer.backing.as_mut(), gone);
}

fn replace_in_snapshot(def: &mut SnapshotDef, replaced: &[Replaced]) {
    for domain in [&mut def.domain, &mut def.inactive].into_iter().flatten() {
        replace_in(Arc::make_mut(domain), replaced);
    }
    for one in replaced {
        for disk in def.disks.iter_mut().filter(|disk| disk.target == one.target) {
            if let DiskMode::External { path, .. } = &mut disk.mode
                && *path == one.gone
            {
                path.clone_from(&one.by);
            }
        }
    }
}
