//! Taking a snapshot.

use super::{Domain, fate};
use crate::authz::{Action, Answer, Caller};
use crate::domain::config::Update;
use crate::error::{Error, Result};
use crate::images;
use crate::job::{Job, Ticket};
use crate::lock::lock;
use crate::store::{Current, Deed, Record};
use crate::time::now_usec;
use crate::verb;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::device::disk::DiskKind;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;
use virt_model::driver::snapshots::{
    CreatePlan, CreatedSnapshot, DiskMode, DiskPart, Journal as _, Machine, MemoryMode, SnapshotRequest,
};
use virt_model::snapshot::{Alignment, Request, SnapshotDef, SnapshotDoc, SnapshotState};
use virt_model::state::{DomainState, Stopped};
use virt_model::xml::{FindingKind, Limits};

/// What a record may be when it is begun, with room for what is added when it is complete.
pub(super) const BEGUN: Limits =
    Limits { size: Limits::ACCEPTED.size - (64 << 10), elements: Limits::ACCEPTED.elements - 1024, ..Limits::ACCEPTED };

/// How a snapshot is taken.
#[derive(Clone, Debug, Default)]
pub struct CreateOptions {
    /// Its name, if the document has none.
    pub name: Option<String>,
    /// Its description, if the document has none.
    pub description: Option<String>,
    /// No memory.
    pub disk_only: bool,
    /// The guest runs while its memory is written.
    pub live: bool,
    /// File systems are frozen by the guest's agent meanwhile.
    pub quiesce: bool,
    /// Overlays exist, made by the caller.
    pub reuse_external: bool,
    /// The guest ends when it is complete.
    pub halt: bool,
    /// No record is kept.
    pub no_metadata: bool,
    /// Only a record is restored.
    pub redefine: bool,
    /// The restored one becomes the current one.
    pub current: bool,
    /// The document is held to the format: it always is.
    pub validate: bool,
    /// `nvram`, `tpm`: parts not to capture.
    pub leave_out: Vec<String>,
    /// Cancel when the caller leaves the bus.
    pub cancel_on_disconnect: bool,
}

/// What a creation would do.
#[derive(Clone, Debug)]
pub struct CreateCheck {
    /// The completed document.
    pub xml: String,
    /// Path, what becomes of it, bytes.
    pub files: Vec<(String, &'static str, u64)>,
    /// The guest stands still for a while.
    pub pauses_guest: bool,
}

/// What a creation would be, by what is known and named alone: no file has been looked at for it.
struct Outline {
    def: SnapshotDef,
    request: SnapshotRequest,
    machine: Machine,
    /// Files that the caller named.
    named: Vec<PathBuf>,
}

/// A creation that has been thought through.
struct Planned {
    def: SnapshotDef,
    request: SnapshotRequest,
    plan: CreatePlan,
    machine: Machine,
}

impl CreateOptions {
    /// Refuses what does not go together.
    fn check(&self) -> Result<()> {
        let invalid = |text: &str| Err(Error::InvalidArgument(text.to_owned()));
        if self.current && !self.redefine {
            return invalid("'current' needs 'redefine': a new snapshot always becomes the current one");
        }
        if self.quiesce && !self.disk_only {
            return invalid("'quiesce' needs 'disk-only'");
        }
        let others = self.no_metadata || self.halt || self.live || self.quiesce || self.reuse_external;
        let named = self.name.is_some() || self.description.is_some();
        if self.redefine && (others || named || !self.leave_out.is_empty()) {
            return invalid(
                "'redefine' only restores a record: it goes with 'current', 'disk-only' and 'validate' alone",
            );
        }
        match self.leave_out.iter().find(|part| !matches!(part.as_str(), "nvram" | "tpm")) {
            Some(part) => invalid(&format!("'leave-out' lists nvram and tpm, not '{part}'")),
            None => Ok(()),
        }
    }

    /// Puts what is told beside the document into it. Error: `InvalidArgument` where it has that already.
    fn complete(&self, doc: &mut SnapshotDoc) -> Result<()> {
        let twice = |what: &str| {
            let text =
                format!("the document has a {what}, and the option '{what}' gives another: leave out one of them");
            Err(Error::InvalidArgument(text))
        };
        match &self.name {
            Some(_) if doc.name().is_some() => return twice("name"),
            Some(name) => doc.set_name(name),
            None => {}
        }
        match &self.description {
            Some(_) if doc.description.is_some() => return twice("description"),
            Some(description) => doc.description = Some(description.clone()),
            None => {}
        }
        Ok(())
    }
}

impl Domain {
    /// Takes a snapshot, or restores the record of one. Gives its name (none if no record is kept) when it is accepted; the
    /// ticket answers when it is complete. On failure everything is as before.
    pub async fn create_snapshot(
        self: &Arc<Self>,
        caller: &Caller,
        xml: &str,
        options: CreateOptions,
    ) -> Result<(Option<String>, Ticket)> {
        self.accepted(caller, &verb::CREATE_SNAPSHOT, self.accept_snapshot(caller, xml, options)).await
    }

    async fn accept_snapshot(
        self: &Arc<Self>,
        caller: &Caller,
        xml: &str,
        options: CreateOptions,
    ) -> Result<(Option<String>, Ticket)> {
        self.allow(caller, verb::CREATE_SNAPSHOT.action).await?;
        options.check()?;
        if options.redefine {
            // The configuration in it is one that a revert would make the domain's.
            self.allow(caller, Action::Define).await?;
        }
        let seat = self.shared.desk.seat(caller.uid, &[xml]).await;
        let mut doc = seat.read(xml, SnapshotDoc::parse).await.map_err(Error::ConfigInvalid)?;
        options.complete(&mut doc)?;
        let seat = seat.read_through().await;
        let caller = &seat.waits_for_nobody(caller);
        if options.redefine {
            return self.redefine_snapshot(caller, doc, &options).await;
        }
        let name = self.snapshot_name(&doc);
        let change = self.change(caller, &verb::CREATE_SNAPSHOT);
        let holds = change.has_turn() && self.is_whole();
        let planned = self.planned_for(caller, &doc, &name, &options).await?;
        let planned = holds.then_some(planned);
        let (keep, leave) = ((!options.no_metadata).then(|| name.clone()), options.cancel_on_disconnect);
        let job = change.open(leave)?;
        Ok((
            keep,
            job.run(async move |domain, job| {
                let planned = match planned {
                    Some(planned) => planned,
                    // The domain may have become another while we waited for our turn.
                    None => domain.think_through(domain.outline(&doc, &name, &options).await?).await?,
                };
                domain.take_snapshot(planned, &options, job).await
            }),
        ))
    }

    /// Whether one of these files is, or is to be, another machine's.
    fn others_name(&self, files: &[&Path]) -> bool {
        let others = self.domains.all();
        others.into_iter().filter(|other| other.uuid != self.uuid && other.hosted.is_none()).any(|other| {
            let state = lock(&other.state);
            let live = state.guest.iter().flat_map(|guest| images(&guest.live).map(Path::new));
            live.chain(state.stored.iter().flat_map(|stored| stored.images())).any(|image| files.contains(&image))
                || state.snapshots.tree.iter().any(|node| {
                    node.content
                        .def
                        .as_ref()
                        .is_ok_and(|def| made_files(&def.disks, &def.memory).any(|f| files.contains(&f)))
                })
        })
    }

    /// What `create_snapshot` would do. Changes nothing.
    pub async fn check_create_snapshot(
        &self,
        caller: &Caller,
        xml: &str,
        options: CreateOptions,
    ) -> Result<Result<CreateCheck>> {
        self.allow(caller, verb::CHECK_CREATE.action).await?;
        let planned = async {
            options.check()?;
            let seat = self.shared.desk.seat(caller.uid, &[xml]).await;
            let mut doc = seat.read(xml, SnapshotDoc::parse).await.map_err(Error::ConfigInvalid)?;
            options.complete(&mut doc)?;
            let seat = seat.read_through().await;
            let caller = &seat.waits_for_nobody(caller);
            if options.redefine {
                let record = self.restored(doc, &options)?;
                let xml = record.document(false).map_err(Error::SnapshotBroken)?;
                return Ok(CreateCheck { xml, files: Vec::new(), pauses_guest: false });
            }
            self.state_to_capture(&options)?;
            // The guest's agent, which is busy meanwhile, is asked only for those who may have it freeze the guest.
            let may = self.shared.authority.can(caller, Action::Snapshot, &self.subject()).await;
            let quiesce = options.quiesce && matches!(may, Answer::Yes);
            let options = CreateOptions { quiesce, ..options };
            let planned = self.planned_for(caller, &doc, &self.snapshot_name(&doc), &options).await?;
            let files = planned.plan.files.iter();
            let files = files.map(|file| (file.path.to_string_lossy().into_owned(), fate(file.what), file.bytes));
            Ok(CreateCheck {
                xml: planned.def.write(false, false),
                files: files.collect(),
                pauses_guest: planned.plan.pauses_guest,
            })
        };
        match planned.await {
            Err(denied @ (Error::AccessDenied(_) | Error::InteractionRequired(_))) => Err(denied),
            planned => Ok(planned),
        }
    }

    /// A creation, thought through for somebody: they are asked for permission before a file is looked at that they named.
    async fn planned_for(
        &self,
        caller: &Caller,
        doc: &SnapshotDoc,
        name: &str,
        options: &CreateOptions,
    ) -> Result<Planned> {
        let outline = self.outline(doc, name, options).await?;
        if outline.names_the_hosts(options) || self.others_name(&outline.files()) {
            // That is for those who may name any file in a configuration.
            self.allow(caller, Action::Define).await?;
        }
        self.think_through(outline).await
    }

    /// The name that is asked for; else the time in seconds, or the next that is free.
    fn snapshot_name(&self, doc: &SnapshotDoc) -> String {
        if let Some(name) = doc.name().filter(|name| !name.is_empty()) {
            return name.to_owned();
        }
        let state = lock(&self.state);
        let free = names_from(now_usec() / 1_000_000).find(|name| state.snapshots.tree.get(name).is_none());
        free.unwrap_or_default()
    }

    async fn outline(&self, doc: &SnapshotDoc, name: &str, options: &CreateOptions) -> Result<Outline> {
        self.takes_snapshots()?;
        // Control characters no snapshot's name may hold, old or new: that is told with the rest of the document.
        if !name.contains(char::is_control) {
            crate::registry::check_new_name("snapshot", name)?;
        }
        let state = self.state_to_capture(options)?;
        self.opens_no_given_image("take a snapshot of")?;
        self.disks_are_idle(None)?;
        self.is_not_backed_up()?;
        let machine = self.machine().await?;
        let active = machine.guest.is_some();
        if !active {
            // What is missing is told by its name.
            self.shared.volumes.plug(&mut machine.def.clone())?;
        }
        let request = Request { active, disk_only: options.disk_only, live: options.live, restored: false };
        let aligned = Alignment::of(doc, name, &machine.def, request).map_err(refused)?;
        if let Some(why) = aligned.not_in_this_state(request) {
            return Err(Error::OperationUnsupported(format!("domain '{}': {why}", self.name())));
        }
        let (parent, inactive) = {
            let state = lock(&self.state);
            if state.snapshots.tree.get(name).is_some() {
                let text = format!("snapshot '{name}' already exists for domain '{}'; delete it first", state.name);
                return Err(Error::SnapshotExists(text));
            }
            state.snapshots.room_for_another(&state.name)?;
            let inactive = state.stored.clone().filter(|_| state.guest.is_some());
            (state.snapshots.tree.current().map(str::to_owned), inactive)
        };
        let inactive = inactive.map(|stored| self.shared.reading_of(&stored)).transpose()?;
        let manual = aligned.disks.iter().any(|disk| disk.mode == DiskMode::Manual);
        let request = SnapshotRequest {
            name: name.to_owned(),
            memory: aligned.memory.clone(),
            disks: aligned.disks.clone(),
            caches: aligned.caches,
            live: options.live,
            quiesce: options.quiesce,
            reuse_external: options.reuse_external,
            stay_paused: options.halt || manual,
            leave_out_nvram: options.leave_out.iter().any(|part| part == "nvram"),
            leave_out_tpm: options.leave_out.iter().any(|part| part == "tpm"),
        };
        let has_memory = aligned.memory != MemoryMode::No;
        let def = SnapshotDef {
            name: name.to_owned(),
            description: doc.description.clone(),
            state,
            parent,
            created: now_usec() / 1_000_000,
            memory: aligned.memory,
            disks: aligned.disks,
            merging: Default::default(),
            kept: doc.kept(),
            of: None,
            domain: Some(machine.def.clone()),
            inactive,
            captured: Vec::new(),
            cpu: machine.guest.as_ref().filter(|_| has_memory).and_then(|guest| guest.expanded_cpu()),
            cookie: None,
        };
        Ok(Outline { def, request, machine, named: aligned.named })
    }

    /// Looks at its record, at the files, and at the guest.
    async fn think_through(&self, outline: Outline) -> Result<Planned> {
        let Outline { def, request, machine, .. } = outline;
        let looked = async {
            self.may_write_images(&request.name, &machine, &request).await?;
            if request.quiesce || request.memory != MemoryMode::No {
                self.is_not_frozen()?;
            }
            let checked = self.takes_snapshots()?.check_create(&machine, &request).await;
            checked.map_err(|e| self.not_taken(&request.name, e))
        };
        let (def, plan) = tokio::try_join!(self.keepable(def), looked)?;
        Ok(Planned { def, plan, request, machine })
    }

    /// Refuses to write images that others stand on: a snapshot inside them, or an overlay that the caller made.
    async fn may_write_images(&self, name: &str, machine: &Machine, request: &SnapshotRequest) -> Result<()> {
        let mut written = Vec::new();
        for part in &request.disks {
            let disk = machine.def.devices.disks.iter().find(|disk| disk.target.dev == part.target);
            if let DiskMode::External { path, .. } = &part.mode {
                self.shared.volumes.refuse_lost(path)?;
            }
            match &part.mode {
                DiskMode::Internal => written.extend(disk.and_then(|disk| disk.path()).map(PathBuf::from)),
                DiskMode::External { path, .. } if request.reuse_external => written.push(path.clone()),
                _ => {}
            }
        }
        let deed = format!("cannot take snapshot '{name}' of domain '{}'", self.name());
        let remedy = "take a snapshot with disk-only";
        self.shared.images.refuse_in_use(&deed, &written, images::Fate::Written, None, remedy).await
    }

    /// Gives back a snapshot whose record can be read again, also when its disks stand on overlays; refuses any other.
    pub(super) async fn keepable(&self, def: SnapshotDef) -> Result<SnapshotDef> {
        let (name, domain) = (def.name.clone(), self.name());
        let kept = crate::desk::aside(move || def.write_readable(BEGUN).map(|_| def)).await;
        kept.map_err(|why| {
            Error::OperationUnsupported(format!("snapshot '{name}' of domain '{domain}' cannot be kept: {why}"))
        })
    }

    /// What the snapshot is to say that the guest did; refuses states that have no meaning here.
    fn state_to_capture(&self, options: &CreateOptions) -> Result<SnapshotState> {
        let state = lock(&self.state);
        state.still_here()?;
        let name = &state.name;
        // One that is off is halted already.
        if options.halt && state.stored.is_none() {
            return Err(Error::OperationInvalid(format!("cannot halt: domain '{name}' is transient")));
        }
        if options.quiesce && !matches!(state.state, DomainState::Running | DomainState::Idle) {
            let text = format!("cannot quiesce '{name}': it is {}, and its agent does not answer", state.state);
            return Err(Error::AgentUnavailable(text));
        }
        match state.state {
            DomainState::PmSuspended => Err(Error::OperationUnsupported(format!(
                "domain '{name}' is asleep (pmsuspended) and cannot be snapshotted; wake it first"
            ))),
            DomainState::Shutdown | DomainState::Crashed | DomainState::Unknown => Err(Error::OperationUnsupported(
                format!("domain '{name}' is {}, and cannot be snapshotted; reset or destroy it first", state.state),
            )),
            DomainState::Shutoff => Ok(SnapshotState::Domain(DomainState::Shutoff)),
            _ if options.disk_only => Ok(SnapshotState::DiskSnapshot),
            DomainState::Paused => Ok(SnapshotState::Domain(DomainState::Paused)),
            DomainState::Running | DomainState::Idle => Ok(SnapshotState::Domain(DomainState::Running)),
        }
    }

    async fn take_snapshot(self: &Arc<Self>, planned: Planned, options: &CreateOptions, job: Arc<Job>) -> Result<()> {
        let Planned { def, request, machine, .. } = planned;
        let deed = Deed::Create { xml: def.write(true, true), keep: !options.no_metadata, running: machine.running };
        let journal = self.journal(deed, &job);
        journal.begin().await?;
        let taken = match self.takes_snapshots()?.create(&machine, &request, journal.clone()).await {
            Ok(taken) => taken,
            Err(e) => {
                journal.end_after_failure(&e).await;
                return Err(self.not_taken(&request.name, e));
            }
        };
        self.snapshot_taken(def, taken, !options.no_metadata, &journal).await?;
        if options.halt {
            self.halt().await?;
        }
        Ok(())
    }

    /// The data is there: what remains is to say so.
    pub(super) async fn snapshot_taken(
        self: &Arc<Self>,
        mut def: SnapshotDef,
        taken: CreatedSnapshot,
        keep: bool,
        journal: &super::DomainJournal,
    ) -> Result<()> {
        if let Some(now) = &taken.def {
            self.stand_on(now).await?;
            journal.step("configurations");
        }
        def.captured = [("nvram", taken.nvram), ("tpm", taken.tpm)]
            .into_iter()
            .filter_map(|(part, how)| Some((part.to_owned(), how?)))
            .collect();
        if keep {
            let (name, order) = (def.name.clone(), lock(&self.state).snapshots.next_order());
            let parent = def.parent.clone();
            let created_usec = within_second(def.created, now_usec());
            let record = Record { name: name.clone(), def: Ok(def), order, created_usec, record: taken.record };
            journal.keep_record(record.clone(), Current(Some(name.clone()))).await?;
            journal.step("record");
            journal.end().await?;
            self.all_told().await.commit(|state| {
                let tree = state.snapshots.change();
                tree.put(&name, parent.as_deref(), Arc::new(record));
                tree.set_current(Some(&name));
                Vec::new()
            });
            return Ok(());
        }
        journal.end().await
    }

    /// Both configurations name the disks that the machine stands on now, on disk and here.
    pub(super) async fn stand_on(&self, now: &DomainDef) -> Result<()> {
        let (live, stored) = self.configurations()?;
        let before = live.clone().or(stored.clone());
        let stored = stored.and_then(|stored| {
            let mut stored = DomainDef::clone(&stored);
            let changed = before.as_ref().is_some_and(|before| switch_disks(&mut stored, before, now));
            changed.then(|| Arc::new(stored))
        });
        let live = live.map(|live| {
            let mut switched = DomainDef::clone(&live);
            switch_disks(&mut switched, &live, now);
            Arc::new(switched)
        });
        self.put_configurations(live, stored, Update::Part).await
    }

    /// The guest ends, now that it is captured.
    async fn halt(self: &Arc<Self>) -> Result<()> {
        let Ok(guest) = self.guest() else { return Ok(()) };
        self.end_as(guest, Stopped::FromSnapshot).await
    }

    pub(super) fn not_taken(&self, name: &str, error: DriverError) -> Error {
        self.driver_failed(&format!("take snapshot '{name}' of"), error)
    }
}

/// The time of a creation in microseconds: in the second that its document names, however long it took from then to `now_usec`.
/// So its record can be restored from the document that is shown, with the same time.
fn within_second(created: u64, now_usec: u64) -> u64 {
    let second = created.saturating_mul(1_000_000);
    now_usec.clamp(second, second.saturating_add(999_999))
}

/// Makes the disks of `def` what they are in `now`, where they were what they are in `before`. Whether any was.
pub(super) fn switch_disks(def: &mut DomainDef, before: &DomainDef, now: &DomainDef) -> bool {
    let mut changed = false;
    for disk in &mut def.devices.disks {
        let same = |other: &&virt_model::device::Disk| other.target.dev == disk.target.dev;
        let (Some(before), Some(now)) = (before.devices.disks.iter().find(same), now.devices.disks.iter().find(same))
        else {
            continue;
        };
        let was_that = disk.path() == before.path() || disk.volume().is_some() && disk.volume() == before.volume();
        if !was_that || now.path() == before.path() {
            continue;
        }
        disk.kind = now.kind;
        disk.source.clone_from(&now.source);
        disk.backing.clone_from(&now.backing);
        let driver = disk.driver.get_or_insert_default();
        driver.format = now.format().map(str::to_owned);
        let cache = |disk: &virt_model::device::Disk| disk.driver.as_ref().and_then(|d| d.metadata_cache.clone());
        if cache(now) != cache(before) {
            driver.metadata_cache = cache(now);
        }
        changed = true;
    }
    changed
}

/// What the document asks for and cannot be: not a document, or not to be had.
pub(super) fn refused(findings: Vec<virt_model::xml::Finding>) -> Error {
    if findings.iter().any(|finding| finding.kind == FindingKind::Invalid) {
        return Error::ConfigInvalid(findings);
    }
    let texts: Vec<String> = findings.into_iter().map(|finding| finding.message).collect();
    Error::ConfigUnsupported(texts.join("; "))
}

impl Outline {
    /// What it would make.
    fn files(&self) -> Vec<&Path> {
        made_files(&self.request.disks, &self.request.memory).collect()
    }

    /// Whether the caller named more of the host than a new file that is called as one of ours would be, beside an image of
    /// the machine's: a place elsewhere, any other name, a device, or what is there already.
    fn names_the_hosts(&self, options: &CreateOptions) -> bool {
        let device = |disk: &DiskPart| matches!(disk.mode, DiskMode::External { block: true, .. });
        let elsewhere = !self.named.iter().all(|file| is_beside_an_image(file, &self.machine.def, &self.request.name));
        options.reuse_external || elsewhere || self.request.disks.iter().any(device)
    }
}

/// Whether a file is called after one of the machine's images and the snapshot, and in the image's folder: `web.one` as an
/// overlay of `web.qcow2` would be, or `web.one.memory`.
fn is_beside_an_image(file: &Path, def: &DomainDef, name: &str) -> bool {
    let images = def.devices.disks.iter().filter(|disk| disk.kind() == DiskKind::File);
    images.filter_map(|disk| Some(Path::new(disk.path()?))).any(|image| {
        let stem = image.file_stem().unwrap_or_default().to_string_lossy();
        let usual = image.with_file_name(format!("{stem}.{name}"));
        let rest = file.as_os_str().to_str().zip(usual.to_str()).and_then(|(file, usual)| file.strip_prefix(usual));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.') && !rest.contains('/'))
    })
}

/// The files that a snapshot has made beside images.
fn made_files<'a>(disks: &'a [DiskPart], memory: &'a MemoryMode) -> impl Iterator<Item = &'a Path> {
    let overlays = disks.iter().filter_map(|disk| match &disk.mode {
        DiskMode::External { path, .. } => Some(path.as_path()),
        _ => None,
    });
    let memory = match memory {
        MemoryMode::External(path) => Some(path.as_path()),
        _ => None,
    };
    overlays.chain(memory)
}

/// The images that a machine names: its disks' with what they stand on, and its firmware variables'.
fn images(def: &DomainDef) -> impl Iterator<Item = &str> {
    let disks = def.devices.disks.iter().flat_map(|disk| disk.chain().filter_map(|layer| layer.path));
    disks.chain(def.os.nvram.as_ref().and_then(|nvram| nvram.path.as_deref()))
}

/// Names that nobody chose: times in seconds from `now` on. Fewer than ten digits would read like the number of a snapshot
/// in an image, so a clock that has not been set counts from 2001 on.
fn names_from(now: u64) -> impl Iterator<Item = String> {
    const TEN_DIGITS: u64 = 1_000_000_000;
    (now.max(TEN_DIGITS)..).map(|seconds| seconds.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn x6_a_clock_that_is_not_set_gives_names_that_no_image_counts_by() {
        assert_eq!(names_from(0).take(2).collect::<Vec<_>>(), ["1000000000", "1000000001"]);
        assert_eq!(names_from(1_795_403_655).next().as_deref(), Some("1795403655"));
    }

    #[test]
    fn a_creation_that_takes_longer_is_of_the_second_in_its_document() {
        assert_eq!(within_second(7, 7_034_853), 7_034_853);
        assert_eq!(within_second(7, 8_034_853), 7_999_999);
        assert_eq!(within_second(7, 6_999_999), 7_000_000, "the clock was set back");
    }
}
