//! What is noted of a pool's files, beside its document: their formats, what they stand on, and what opens them.

use super::{Pool, State};
use crate::error::Result;
use crate::frames::Changeable as _;
use crate::lock::lock;
use crate::store::{Folder, on_disk};
use crate::uses::{Need, Needed};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use virt_model::driver::storage::{FileId, KnownFormats, VolumeLook};
use virt_model::secret::SecretName;
use virt_model::storage::pool::PoolKind;

/// What is noted of files, beside a pool's document.
pub(super) const NOTED: &str = "volumes";

/// What is noted of a file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Noted {
    pub format: String,
    pub owner: u32,
    /// Its format is what its header said when it was last written, and is noted for as long as it is incomplete.
    #[serde(default)]
    pub probed: bool,
    /// What was being written to it was cut off.
    #[serde(default)]
    pub incomplete: bool,
    /// What a guest sees of it, where it is incomplete: its header may not say it any more.
    #[serde(default)]
    pub capacity: u64,
    /// What it was put on when it was made. Its header says that, too, and is no wish of anybody's: who writes the file writes it.
    #[serde(default)]
    pub base: Option<PathBuf>,
    /// The volume that it is, while it stands on that.
    #[serde(default)]
    pub stands: Option<String>,
    /// What opens it, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<NotedSecret>,
}

/// The secret that opens a volume. Who undefines it loses what the volume holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct NotedSecret {
    /// The volume, as it was called when it was made.
    pub volume: String,
    /// The secret's uuid, or what it is for.
    pub named: String,
}

impl NotedSecret {
    pub(super) fn need(&self) -> Need {
        Need { what: Needed::Secret(SecretName::of_volume(&self.named)), place: self.volume.as_str().into() }
    }
}

impl Pool {
    /// Formats that are noted.
    pub(super) fn known(&self) -> KnownFormats {
        let state = lock(&self.state);
        Arc::new(state.noted.iter().map(|(id, noted)| (*id, noted.format.clone())).collect())
    }

    /// What a volume was put on when it was made, if nothing else is noted of its file since.
    pub(super) fn noted_base(&self, look: &VolumeLook) -> Option<PathBuf> {
        lock(&self.state).noted.get(&look.id)?.base.clone()
    }

    /// What volumes were put on when they were made, and stand on still, or did when the pool was last read: files stay where they
    /// are while it is stopped, and until it is read anew.
    pub(super) fn noted_bases(&self) -> Vec<(PathBuf, Arc<str>)> {
        let state = lock(&self.state);
        let on = |noted: &Noted| Some((noted.base.clone()?, noted.stands.as_deref()?.into()));
        state.noted.values().filter(|_| !state.gone).filter_map(on).collect()
    }

    /// Notes something of a file, or that nothing is known any more. Blocks.
    pub(super) fn note(&self, id: FileId, noted: Option<Noted>) -> Result<()> {
        self.save_noted(|all| {
            match noted {
                Some(noted) => all.insert(id, noted),
                None => all.remove(&id),
            };
        })
    }

    /// Forgets what is noted of those of these files that are gone, where another file could pass for one: on a share whose server does
    /// not say when a file was born a new one has the number of one that was removed, and would have its owner, format and secret.
    pub(super) async fn forget_lost(self: &Arc<Self>, files: Vec<FileId>) -> Result<()> {
        let lost = lock(&self.state).lost(files);
        if lost.is_empty() {
            return Ok(());
        }
        let pool = self.clone();
        on_disk(move || pool.save_noted(|all| all.retain(|id, _| !lost.contains(id)))).await
    }

    /// Changes what is noted of files. Blocks.
    pub(super) fn save_noted(&self, change: impl FnOnce(&mut HashMap<FileId, Noted>)) -> Result<()> {
        let _writing = lock(&self.notes);
        let all = {
            let mut state = lock(&self.state);
            change(&mut state.noted);
            let mut all: Vec<(FileId, Noted)> = state.noted.iter().map(|(id, noted)| (*id, noted.clone())).collect();
            all.sort_by_key(|(id, _)| *id);
            all
        };
        let saved = self.shared.store.documents(Folder::Pools).save_beside(self.uuid, NOTED, &all);
        self.tell_noted_needs();
        saved
    }

    /// Whose a volume of that name is, and what opens it, if there is one.
    pub(super) fn noted_of(&self, name: &str) -> Option<(u32, Option<NotedSecret>)> {
        let state = lock(&self.state);
        let look = &state.volumes.get(name)?.look;
        let noted = state.noted.get(&look.id);
        Some((noted.map_or(look.permissions.0, |noted| noted.owner), noted.and_then(|noted| noted.secret.clone())))
    }

    /// Says which secrets open its volumes, active or not, and which one lets it come to its server.
    pub(super) fn tell_needs(&self) {
        let _writing = lock(&self.notes);
        self.tell_noted_needs();
    }

    /// The same for who holds its notes: what is told last is what is so last.
    pub(super) fn tell_noted_needs(&self) {
        let needs: Vec<Need> = {
            let state = lock(&self.state);
            let noted = state.noted.values().filter(|_| !state.gone);
            let own = state.def.secret().filter(|_| state.persistent && !state.gone);
            let own = own.map(|uuid| Need { what: Needed::Secret(SecretName::Uuid(uuid)), place: "".into() });
            noted.filter_map(|noted| noted.secret.as_ref()).map(NotedSecret::need).chain(own).collect()
        };
        self.shared.uses.are(self.reference(), &[], &needs);
    }
}

impl State {
    /// Those of these files that are gone, something is noted of, and another file could pass for.
    fn lost(&self, files: Vec<FileId>) -> HashSet<FileId> {
        if self.live.as_ref().is_none_or(|live| live.kind != PoolKind::Netfs) {
            return HashSet::new();
        }
        let there: HashSet<FileId> = self.volumes.values().map(|row| row.look.id).collect();
        let is_lost = |id: &FileId| id.born == 0 && !there.contains(id) && self.noted.contains_key(id);
        files.into_iter().filter(is_lost).collect()
    }
}
