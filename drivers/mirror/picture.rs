//! What a host says of a machine at a moment, and what must have happened between two such moments.

use virt_model::driver::Exit;
use virt_model::driver::inventory::Seen;

/// A machine at a moment, as its host says it.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    /// What it is.
    pub seen: Seen,
    /// What it does.
    pub run: Run,
    /// Another value for each time that it was started, where the host has such a thing: two runs are told apart by it, though
    /// nobody saw the end of the first.
    pub mark: Option<u64>,
}

/// What a machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// It is off.
    Off {
        /// The host says that it was ended by force.
        forced: bool,
    },
    /// Its CPUs run.
    Running,
    /// Its CPUs stand.
    Paused,
    /// It is on its way from one to another: the last that it was counts on.
    Between,
}

impl Run {
    /// Whether there is a guest.
    pub fn is_active(self) -> bool {
        matches!(self, Run::Running | Run::Paused)
    }

    /// Whether it has come to something other than this.
    pub(super) fn has_left(self, old: Run) -> bool {
        self != old && self != Run::Between
    }
}

/// What has happened to a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Difference {
    /// Its guest has ended.
    Ended(Exit),
    /// It is new, or otherwise than it was.
    Seen,
    /// It runs; what it does is in the picture.
    Started,
    /// Its CPUs were stopped.
    Suspended,
    /// Its CPUs go on.
    Resumed,
    /// There is no such machine any more.
    Gone,
}

/// What must have happened to a machine from `old` to `new`, in the order in which it is told; nothing of one that is not there.
/// Neither is on its way: see [`settled`].
pub(super) fn differences(old: Option<&Picture>, new: Option<&Picture>) -> Vec<Difference> {
    let was = old.map_or(Run::Off { forced: false }, |old| old.run);
    let Some(new) = new else {
        let ended = was.is_active().then_some(Difference::Ended(Exit::Orderly));
        return ended.into_iter().chain(old.map(|_| Difference::Gone)).collect();
    };
    let runs_anew = was.is_active() && new.run.is_active() && old.is_some_and(|old| old.mark != new.mark);
    let exit = if new.run == (Run::Off { forced: true }) { Exit::Forced } else { Exit::Orderly };
    let mut all = Vec::new();
    if was.is_active() && !new.run.is_active() || runs_anew {
        all.push(Difference::Ended(exit));
    }
    if old.is_none_or(|old| old.seen != new.seen) {
        all.push(Difference::Seen);
    }
    all.extend(match (was, new.run) {
        (_, now) if now.is_active() && (runs_anew || !was.is_active()) => Some(Difference::Started),
        (Run::Running, Run::Paused) => Some(Difference::Suspended),
        (Run::Paused, Run::Running) => Some(Difference::Resumed),
        _ => None,
    });
    all
}

/// A new picture without what is only on its way: in that the machine does what it last did.
pub(super) fn settled(old: Option<&Picture>, new: Picture) -> Picture {
    if new.run != Run::Between {
        return new;
    }
    let (run, mark) = old.map_or((Run::Off { forced: false }, None), |old| (old.run, old.mark));
    Picture { run, mark, ..new }
}

#[cfg(test)]
mod tests {
    use super::Difference::*;
    use super::*;
    use std::sync::Arc;
    use uuid::Uuid;
    use virt_model::domain::DomainDef;
    use virt_model::driver::inventory::Key;

    const OFF: Run = Run::Off { forced: false };

    fn picture(name: &str, run: Run, mark: u64) -> Picture {
        let def = Arc::new(DomainDef { name: name.to_owned(), ..DomainDef::default() });
        let seen =
            virt_model::driver::inventory::Seen { key: Key("7".into()), uuid: Uuid::nil(), name: name.to_owned(), def };
        Picture { seen, run, mark: Some(mark) }
    }

    /// Name, what it does, and the mark of its run.
    type Case = Option<(&'static str, Run, u64)>;

    #[test]
    fn what_has_happened_follows_from_two_pictures() {
        let forced = Run::Off { forced: true };
        let (running, paused) = (Run::Running, Run::Paused);
        let table: &[(Case, Case, &[Difference])] = &[
            (None, None, &[]),
            (None, Some(("a", OFF, 0)), &[Seen]),
            (None, Some(("a", running, 1)), &[Seen, Started]),
            (None, Some(("a", paused, 1)), &[Seen, Started]),
            (Some(("a", OFF, 0)), None, &[Gone]),
            (Some(("a", paused, 1)), None, &[Ended(Exit::Orderly), Gone]),
            (Some(("a", OFF, 0)), Some(("a", OFF, 0)), &[]),
            (Some(("a", OFF, 0)), Some(("a", forced, 0)), &[]),
            (Some(("a", OFF, 0)), Some(("b", OFF, 0)), &[Seen]),
            (Some(("a", OFF, 0)), Some(("b", running, 1)), &[Seen, Started]),
            (Some(("a", OFF, 1)), Some(("a", paused, 2)), &[Started]),
            (Some(("a", running, 1)), Some(("a", running, 1)), &[]),
            (Some(("a", running, 1)), Some(("a", paused, 1)), &[Suspended]),
            (Some(("a", paused, 1)), Some(("a", running, 1)), &[Resumed]),
            (Some(("a", running, 1)), Some(("a", OFF, 1)), &[Ended(Exit::Orderly)]),
            (Some(("a", paused, 1)), Some(("a", forced, 1)), &[Ended(Exit::Forced)]),
            (Some(("a", running, 1)), Some(("b", forced, 1)), &[Ended(Exit::Forced), Seen]),
            (Some(("a", running, 1)), Some(("a", running, 2)), &[Ended(Exit::Orderly), Started]),
            (Some(("a", running, 1)), Some(("b", paused, 2)), &[Ended(Exit::Orderly), Seen, Started]),
        ];
        for (old, new, told) in table {
            let [before, after] = [old, new].map(|case| case.map(|(name, run, mark)| picture(name, run, mark)));
            assert_eq!(differences(before.as_ref(), after.as_ref()), *told, "{old:?} -> {new:?}");
        }
    }

    #[test]
    fn what_is_on_its_way_is_what_it_was() {
        let old = picture("a", Run::Paused, 3);
        let new = settled(Some(&old), picture("b", Run::Between, 4));
        assert_eq!((new.run, new.mark, &*new.seen.name), (Run::Paused, Some(3), "b"));
        assert_eq!(differences(Some(&old), Some(&new)), [Seen]);
        assert_eq!(settled(None, picture("a", Run::Between, 1)).run, OFF);
        assert_eq!(settled(Some(&old), picture("a", OFF, 3)).run, OFF);
    }
}
