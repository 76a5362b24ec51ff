//! Deleting a snapshot: what is inside images is removed, overlays are merged into what they stand on.

use super::internal::BeforeForgetting;
use super::note::NotedSnapshot;
use super::note::record_of;
use super::note::written;
use super::note::{Delete, Merge, Note};
use super::survey::Survey;
use super::{Operation, pairs};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::domain::DomainDef;
use virt_model::driver::snapshots::{
    DeletePlan, DiskMode, DiskPart, ExistingSnapshot, FileChange, FileFate, Journal, NoteSync, Replaced, Siblings,
    Unfinished,
};
use virt_model::driver::{DriverError, StoredFile};

/// A file, its format, and what it stands on.
pub(super) struct JobStatus {
    pub target: String,
    pub file: PathBuf,
    pub format: String,
    pub on: PathBuf,
    /// Whose it is, for people.
    whose: String,
}

/// An overlay that nothing stands on.
pub(super) struct Leaf {
    pub target: String,
    pub file: PathBuf,
    format: String,
}

/// Where a deletion is noted.
pub(super) struct Noted<'a> {
    journal: Option<&'a Arc<dyn Journal>>,
    /// Ready once the note is on disk.
    synced: NoteSync,
}

impl Noted<'_> {
    /// By an earlier virtd, and nobody is told.
    pub fn before() -> Self {
        Noted { journal: None, synced: Box::pin(async { Ok(()) }) }
    }
}

/// What is to be done, and what that is known from.
pub(super) struct Plan {
    pub deed: Delete,
    pub leaves: Vec<Leaf>,
    pub standing: Vec<JobStatus>,
}

impl Operation {
    pub(super) async fn check_delete(
        &self,
        snapshot: &ExistingSnapshot,
        siblings: &Siblings,
    ) -> Result<DeletePlan, DriverError> {
        let plan = self.deletion(snapshot, siblings).await?;
        let (memory, copies) = self.leavings(snapshot).await?;
        let leavings: Vec<PathBuf> = memory.map(|memory| memory.path).into_iter().chain(copies).collect();
        let merged = plan.deed.merges.iter().map(|merge| &merge.overlay);
        let survey = self.survey(merged.chain(&plan.deed.unlinks).chain(&leavings).cloned()).await?;
        let change = |path: &Path, what| FileChange { path: path.to_owned(), what, bytes: survey.size(path) };
        let mut files: Vec<FileChange> =
            plan.deed.merges.iter().map(|merge| change(&merge.overlay, FileFate::Merged)).collect();
        files.extend(plan.deed.unlinks.iter().map(|path| change(path, FileFate::Deleted)));
        files.extend(leavings.iter().map(|path| change(path, FileFate::Deleted)));
        let written = plan.deed.merges.iter().map(|merge| merge.base.clone()).collect();
        Ok(DeletePlan { files, written, refused: self.may_be_done(&plan, snapshot).await.err() })
    }

    /// What is to be done, as far as it is recorded.
    async fn deletion(&self, snapshot: &ExistingSnapshot, siblings: &Siblings) -> Result<Plan, DriverError> {
        let standing = self.survey(made_by_others(siblings)).await?;
        let (mut merges, mut leaves, standing) = (Vec::new(), Vec::new(), self.standing(siblings, &standing));
        let reverts: Vec<PathBuf> = self.own_reverts(snapshot).await.into_iter().map(|(file, _)| file).collect();
        // What is looked at from here on, and goes then, is these very files.
        let judged = self.judged(made_by(&snapshot.disks).chain(reverts.iter().cloned()).collect()).await?;
        for (disk, part) in pairs(&snapshot.def, &snapshot.disks) {
            let DiskMode::External { path, block, format } = &part.mode else { continue };
            let (base, base_format) = (PathBuf::from(disk.path().unwrap_or_default()), disk.meant_format());
            // What it made, and what reverts to it have made.
            let on_base = |file: &&PathBuf| standing.iter().any(|one| one.file == **file && one.on == base);
            let mut overlays = vec![(path.clone(), format.clone())];
            overlays.extend(reverts.iter().filter(on_base).map(|file| (file.clone(), "qcow2".to_owned())));
            for (file, format) in overlays {
                match self.one_merge(&part.target, &file, &format, (&base, base_format), &standing) {
                    Some(merge) => merges.push(merge),
                    None if *block || !self.stands_on(&file, &format, &base).await => {}
                    None => leaves.push(Leaf { target: part.target.clone(), file, format }),
                }
            }
        }
        let survey = self.survey(reverts.iter().cloned()).await?;
        let unneeded = |file: &&PathBuf| survey.is_there(file) && !standing.iter().any(|one| one.file == **file);
        let unlinks = leaves.iter().map(|leaf| &leaf.file).chain(reverts.iter().filter(unneeded)).cloned().collect();
        let deed = Delete {
            snapshot: NotedSnapshot::of(snapshot),
            merges,
            unlinks,
            judged: Some(judged),
            synced: None,
            resume: false,
            merged: Vec::new(),
        };
        Ok(Plan { deed, leaves, standing })
    }

    /// Refuses what would lose something else, or what is not as it is recorded. Changes nothing.
    async fn may_be_done(&self, plan: &Plan, snapshot: &ExistingSnapshot) -> Result<(), DriverError> {
        if plan.deed.merges.iter().any(|merge| merge.live) {
            self.nobody_else_works().await?;
            if self.body.is_some() {
                self.keeps_what_is_written("a merge")?;
            }
        }
        self.chains_are_as_recorded(plan, snapshot).await?;
        for leaf in &plan.leaves {
            self.holds_nothing(&leaf.target, &leaf.file, &leaf.format).await?;
        }
        for merge in &plan.deed.merges {
            self.loses_nothing(merge, &plan.deed, &plan.standing).await?;
        }
        Ok(())
    }

    /// An overlay that something stands on, or the machine itself; `None` if nothing does.
    fn one_merge(
        &self,
        target: &str,
        overlay: &Path,
        format: &str,
        (base, base_format): (&Path, &str),
        standing: &[JobStatus],
    ) -> Option<Merge> {
        let current = self.machine.def.devices.disks.iter().find(|disk| disk.target.dev == target);
        let live = current.is_some_and(|disk| disk.files().iter().any(|one| one == overlay));
        let above = standing.iter().filter(|one| one.on == overlay);
        let mut above: Vec<(PathBuf, String)> = above.map(|one| (one.file.clone(), one.format.clone())).collect();
        above.sort();
        above.dedup();
        (live || !above.is_empty()).then(|| Merge {
            target: target.to_owned(),
            overlay: overlay.to_owned(),
            format: format.to_owned(),
            base: base.to_owned(),
            base_format: base_format.to_owned(),
            above,
            live,
        })
    }

    /// Refuses a merge that would destroy what else stands on the base, or is in the overlay.
    async fn loses_nothing(&self, merge: &Merge, deed: &Delete, standing: &[JobStatus]) -> Result<(), DriverError> {
        let (target, base) = (&merge.target, merge.base.display());
        self.holds_nothing(target, &merge.overlay, &merge.format).await?;
        let other =
            |one: &&JobStatus| one.on == merge.base && one.file != merge.overlay && !deed.unlinks.contains(&one.file);
        if let Some(other) = standing.iter().find(other) {
            let (file, whose) = (other.file.display(), &other.whose);
            return Err(DriverError::Unsupported(format!(
                "disk '{target}': {base} also carries {file} ({whose}), which a merge would destroy; delete that first"
            )));
        }
        if !self.is_there(&merge.base).await? {
            let overlay = merge.overlay.display();
            return Err(DriverError::Storage(format!(
                "disk '{target}': {base}, on which {overlay} stands, is not there; nothing was changed"
            )));
        }
        Ok(())
    }

    /// An overlay that holds internal snapshots cannot go without them.
    async fn holds_nothing(&self, target: &str, overlay: &Path, format: &str) -> Result<(), DriverError> {
        if format != "qcow2" {
            return Ok(());
        }
        let image = overlay.to_owned();
        let inner = self.with_lent(vec![(image.clone(), false)], move |images| {
            Ok(images.info(&image, "qcow2")?.snapshots.into_iter().map(|inner| inner.name).collect::<Vec<_>>())
        });
        match inner.await?.first() {
            None => Ok(()),
            Some(inner) => Err(DriverError::Unsupported(format!(
                "the overlay of disk '{target}' holds the internal snapshot '{inner}', which would be lost; delete \
                 '{inner}' first"
            ))),
        }
    }

    /// Everything that is known to stand on something: by the machine, and by all other snapshots.
    fn standing(&self, siblings: &Siblings, survey: &Survey) -> Vec<JobStatus> {
        let mut all = Vec::new();
        let add = |all: &mut Vec<JobStatus>, def: &DomainDef, whose: &str| {
            for disk in &def.devices.disks {
                let files = disk.files();
                for pair in files.windows(2) {
                    let top = disk.path().map(Path::new) == Some(&pair[0]);
                    let format = if top { disk.format().unwrap_or("qcow2") } else { "qcow2" };
                    all.push(JobStatus {
                        target: disk.target.dev.clone(),
                        file: pair[0].clone(),
                        format: format.to_owned(),
                        on: pair[1].clone(),
                        whose: whose.to_owned(),
                    });
                }
            }
        };
        add(&mut all, &self.machine.def, "the machine as it is now");
        siblings.stored.iter().for_each(|stored| add(&mut all, stored, "the stored configuration"));
        let others = siblings.others.iter().filter(|other| !siblings.deleted_together.contains(&other.name));
        for other in others {
            let whose = format!("snapshot '{}'", other.name);
            add(&mut all, &other.def, &whose);
            for (disk, part) in pairs(&other.def, &other.disks) {
                if let (DiskMode::External { path, format, .. }, Some(base)) = (&part.mode, disk.path())
                    && survey.is_there(path)
                {
                    all.push(JobStatus {
                        target: part.target.clone(),
                        file: path.clone(),
                        format: format.clone(),
                        on: PathBuf::from(base),
                        whose: whose.clone(),
                    });
                }
            }
        }
        all
    }

    pub(super) async fn delete(
        &self,
        snapshot: &ExistingSnapshot,
        siblings: &Siblings,
        journal: &Arc<dyn Journal>,
    ) -> Result<Vec<Replaced>, Unfinished> {
        let plan = self.deletion(snapshot, siblings).await?;
        self.may_be_done(&plan, snapshot).await?;
        let mut deed = plan.deed;
        let images = self.held_images(snapshot, &record_of(snapshot));
        // That is looked at while the note is written.
        let (noted, known) =
            tokio::join!(journal.note_at_once(written(&Note::Delete(deed.clone()))?), self.before_forgetting(&images));
        let noted = Noted { journal: Some(journal), synced: noted? };
        // Half a merge cannot be taken back: it goes to its end, or it is not begun.
        journal.point_of_no_return();
        self.goes_to_its_end();
        if journal.cancelled().is_cancelled() {
            return Err(DriverError::Cancelled.into());
        }
        if !deed.merges.is_empty() {
            journal.merging(&targets(&deed)).await?;
        }
        self.carry_out(snapshot, &mut deed, known, noted).await
    }

    /// Every step can be done again. What has been merged when one fails is merged for good. `known`: what was looked at
    /// before.
    pub(super) async fn carry_out(
        &self,
        snapshot: &ExistingSnapshot,
        deed: &mut Delete,
        known: BeforeForgetting,
        noted: Noted<'_>,
    ) -> Result<Vec<Replaced>, Unfinished> {
        let done = self.work_off(snapshot, deed, known, noted).await;
        let merged = deed.merges.iter().filter(|merge| deed.merged.contains(&merge.target));
        let replaced = merged.map(|merge| Replaced {
            target: merge.target.clone(),
            gone: merge.overlay.clone(),
            by: merge.base.clone(),
            format: Some(merge.base_format.clone()),
        });
        let replaced = replaced.collect();
        match done {
            Ok(()) => Ok(replaced),
            Err(error) => Err(Unfinished { error: to_be_repeated(error), replaced, merging: targets(deed) }),
        }
    }

    async fn work_off(
        &self,
        snapshot: &ExistingSnapshot,
        deed: &mut Delete,
        known: BeforeForgetting,
        Noted { journal, synced }: Noted<'_>,
    ) -> Result<(), DriverError> {
        let step = |what: &str| journal.iter().for_each(|journal| journal.step(what));
        let images = self.held_images(snapshot, &record_of(snapshot));
        // Inside images it is forgotten once more at no harm; what is merged or removed is not.
        let (forgotten, synced) = tokio::join!(self.forget_as_known(&snapshot.name, &images, true, known), synced);
        forgotten.and(synced)?;
        step("forgotten");
        for merge in deed.merges.clone() {
            self.merge(&merge, snapshot, deed, journal).await?;
            step("merged");
            self.remove_of(deed, vec![merge.overlay], Vec::new()).await;
            // What stood on the overlay has this frozen below it now.
            self.note_frozen(vec![merge.base]).await;
        }
        let (memory, copies) = self.leavings(snapshot).await?;
        self.remove_of(deed, deed.unlinks.clone(), memory.into_iter().collect()).await;
        self.remove_files(copies).await;
        step("removed");
        Ok(())
    }

    /// Removes overlays of the deed, as far as they are what was judged before, and `others`.
    async fn remove_of(&self, deed: &Delete, overlays: Vec<PathBuf>, mut others: Vec<StoredFile>) {
        match &deed.judged {
            Some(judged) => {
                others.extend(judged.iter().filter(|file| overlays.contains(&file.path)).cloned());
                self.remove_judged(others, Vec::new()).await;
            }
            None => self.remove_judged(others, overlays).await,
        }
    }
}

/// The overlays that other snapshots have made.
fn made_by_others(siblings: &Siblings) -> Vec<PathBuf> {
    siblings.others.iter().flat_map(|other| made_by(&other.disks)).collect()
}

/// The overlays that a snapshot has made.
fn made_by(disks: &[DiskPart]) -> impl Iterator<Item = PathBuf> {
    disks.iter().filter_map(|part| match &part.mode {
        DiskMode::External { path, .. } => Some(path.clone()),
        _ => None,
    })
}

/// The same, with what is to be done about it.
fn to_be_repeated(error: DriverError) -> DriverError {
    let with_remedy = |text: String| format!("{text}; delete it again to do the rest");
    match error {
        DriverError::Storage(text) => DriverError::Storage(with_remedy(text)),
        DriverError::NoSpace(text) => DriverError::NoSpace(with_remedy(text)),
        DriverError::Hypervisor(text) => DriverError::Hypervisor(with_remedy(text)),
        other => other,
    }
}

/// The disks that are merged.
fn targets(deed: &Delete) -> Vec<String> {
    deed.merges.iter().map(|merge| merge.target.clone()).collect()
}
