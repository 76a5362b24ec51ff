//! What is known of the machines of a host, and how news of them are told. A verb has its machine to itself: what was seen
//! before its end says nothing of it.

use super::picture::{Difference, Picture, differences, settled};
use std::collections::{BTreeMap, BTreeSet};
use tokio::sync::mpsc::UnboundedSender;
use virt_model::driver::inventory::{HostReport, Key};
use virt_model::driver::{Condition, DriverEvent, EventSink, Exit};
use virt_model::state::Suspended;

/// All machines of a host.
#[derive(Default)]
pub(super) struct Machines {
    all: BTreeMap<Key, Machine>,
    /// Counts what happens to what is known: that pictures are asked for, and the ends of verbs.
    count: u64,
    /// When pictures were asked for in which one was last found gone: it is not in older ones, though they show it.
    last_gone: Asked,
    to: Option<UnboundedSender<HostReport>>,
}

/// One of them.
struct Machine {
    picture: Picture,
    /// Who follows its guest.
    sink: Option<EventSink>,
    /// Verbs that are at it.
    busy: u32,
    /// When what is known of it was asked for, or a verb ended on it: older pictures say nothing of it.
    newest: Asked,
}

/// What a verb of ours explains of a new picture.
pub(super) enum Ours {
    /// Nothing.
    Nothing,
    /// That it runs, followed from now on by this.
    Start(EventSink),
    /// That its CPUs stand.
    Suspend,
    /// That its CPUs go on.
    Resume,
    /// That it is off.
    Destroy,
}

/// When pictures were asked for: what was seen or done since is not in them.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Asked(u64);

impl Machines {
    /// Where news go from now on.
    pub fn tell_to(&mut self, to: UnboundedSender<HostReport>) {
        self.to = Some(to);
    }

    /// Pictures are about to be asked for.
    pub fn asking(&mut self) -> Asked {
        self.count += 1;
        Asked(self.count)
    }

    /// A verb begins to have a machine to itself. `false`: there is no such machine.
    pub fn begin(&mut self, key: &Key) -> bool {
        self.all.get_mut(key).map(|machine| machine.busy += 1).is_some()
    }

    /// A verb has ended.
    pub fn end(&mut self, key: &Key) {
        self.count += 1;
        if let Some(machine) = self.all.get_mut(key) {
            machine.busy = machine.busy.saturating_sub(1);
            machine.newest = Asked(self.count);
        }
    }

    /// All pictures of a host as it is since `asked`: tells what is otherwise.
    pub fn are(&mut self, asked: Asked, pictures: Vec<Picture>) {
        let there: BTreeSet<Key> = pictures.iter().map(|picture| picture.seen.key.clone()).collect();
        let mut gone: Vec<Key> = self.all.keys().filter(|key| !there.contains(key)).cloned().collect();
        gone.retain(|key| self.is_free_since(key, asked));
        gone.iter().for_each(|key| self.is(key, asked, None, Ours::Nothing));
        for picture in pictures {
            let key = picture.seen.key.clone();
            if self.is_free_since(&key, asked) {
                self.is(&key, asked, Some(picture), Ours::Nothing);
            }
        }
    }

    fn is_free_since(&self, key: &Key, asked: Asked) -> bool {
        self.is_news(key, asked) && self.all.get(key).is_none_or(|machine| machine.busy == 0)
    }

    /// Whether nothing newer is known of a machine than what was asked for then.
    fn is_news(&self, key: &Key, asked: Asked) -> bool {
        self.all.get(key).map_or(self.last_gone, |machine| machine.newest) <= asked
    }

    /// The host speaks again: it says anew what it has, and what of that is new is found out by who listens.
    pub fn tell_anew(&self) {
        for machine in self.all.values() {
            self.tell(HostReport::Seen(Box::new(machine.picture.seen.clone())));
        }
    }

    /// A machine was so, or not there any more, when that was asked for: tells what is otherwise, but for what a verb explains. If
    /// something newer is known, that is what it is.
    pub fn is(&mut self, key: &Key, asked: Asked, new: Option<Picture>, ours: Ours) {
        let old = self.all.get(key).map(|machine| &machine.picture);
        let new = if self.is_news(key, asked) { new } else { old.cloned() };
        let new = new.map(|new| settled(old, new));
        let told = differences(old, new.as_ref());
        let mut sink = self.all.get_mut(key).and_then(|machine| machine.sink.take());
        let mut ours = ours;
        for difference in told {
            match difference {
                Difference::Ended(exit) => {
                    let exit = if matches!(ours, Ours::Destroy) { Exit::Requested } else { exit };
                    report(sink.take().as_ref(), DriverEvent::Exited(exit));
                }
                Difference::Seen => {
                    let seen = new.iter().map(|new| HostReport::Seen(Box::new(new.seen.clone())));
                    seen.for_each(|seen| self.tell(seen));
                }
                Difference::Started => match std::mem::replace(&mut ours, Ours::Nothing) {
                    Ours::Start(follower) => sink = Some(follower),
                    _ => self.tell(HostReport::Active(key.clone())),
                },
                Difference::Suspended if matches!(ours, Ours::Suspend) => {
                    report(sink.as_ref(), DriverEvent::Suspended(Suspended::Paused));
                }
                Difference::Suspended => report(sink.as_ref(), DriverEvent::SuspendedByOthers),
                Difference::Resumed if matches!(ours, Ours::Resume) => report(sink.as_ref(), DriverEvent::Resumed),
                Difference::Resumed => report(sink.as_ref(), DriverEvent::ResumedByOthers),
                Difference::Gone => self.tell(HostReport::Gone(key.clone())),
            }
        }
        // It was seen to run before: nobody has taken it up yet.
        if let (Ours::Start(follower), None, Some(new)) = (ours, &sink, &new) {
            sink = Some(follower).filter(|_| new.run.is_active());
        }
        match (new, self.all.get_mut(key)) {
            (Some(picture), Some(machine)) => {
                (machine.picture, machine.sink, machine.newest) = (picture, sink, machine.newest.max(asked));
            }
            (Some(picture), None) => {
                self.all.insert(key.clone(), Machine { picture, sink, busy: 0, newest: asked });
            }
            (None, known) => {
                if known.is_some() {
                    self.last_gone = self.last_gone.max(asked);
                }
                self.all.remove(key);
            }
        }
    }

    /// What is known of a machine.
    pub fn picture(&self, key: &Key) -> Option<&Picture> {
        self.all.get(key).map(|machine| &machine.picture)
    }

    /// The guest of a machine is followed from now on; `None` if there is none, or somebody follows it.
    pub fn follow(&mut self, key: &Key, sink: EventSink) -> Option<&Picture> {
        let machine = self.all.get_mut(key)?;
        if !machine.picture.run.is_active() || machine.sink.is_some() {
            return None;
        }
        machine.sink = Some(sink);
        Some(&machine.picture)
    }

    /// Tells of the host.
    pub fn tell(&self, report: HostReport) {
        // Without a listener virtd is closing.
        self.to.iter().for_each(|to| _ = to.send(report.clone()));
    }
}

fn report(sink: Option<&EventSink>, event: DriverEvent) {
    // Nobody who has taken it up yet is told what it does when that happens.
    sink.iter().for_each(|sink| _ = sink.send(event.clone()));
}

/// What a guest that is taken up does.
pub(super) fn condition(picture: &Picture) -> Condition {
    match picture.run {
        super::Run::Paused => Condition::Suspended(Suspended::Paused),
        _ => Condition::Running,
    }
}

#[cfg(test)]
mod tests {
    use super::super::Run;
    use super::*;
    use std::sync::Arc;
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
    use virt_model::domain::DomainDef;
    use virt_model::driver::inventory::Seen;

    fn picture(key: &Key, run: Run) -> Picture {
        let seen = Seen {
            key: key.clone(),
            uuid: uuid::Uuid::nil(),
            name: "a".to_owned(),
            def: Arc::new(DomainDef::default()),
        };
        Picture { seen, run, mark: None }
    }

    fn told(reports: &mut UnboundedReceiver<HostReport>) -> Vec<&'static str> {
        std::iter::from_fn(|| reports.try_recv().ok())
            .map(|report| match report {
                HostReport::Seen(_) => "seen",
                HostReport::Active(_) => "active",
                HostReport::Gone(_) => "gone",
                _ => "another",
            })
            .collect()
    }

    #[test]
    fn older_pictures_say_nothing() {
        let key = Key("7".into());
        let (to, mut reports) = unbounded_channel();
        let mut machines = Machines::default();
        machines.tell_to(to);
        let [first, second, third] = [(); 3].map(|()| machines.asking());
        machines.are(second, vec![picture(&key, Run::Running)]);
        assert_eq!(told(&mut reports), ["seen", "active"]);
        // It was off, or not there, before.
        machines.are(first, vec![picture(&key, Run::Off { forced: false })]);
        machines.are(first, Vec::new());
        machines.is(&key, first, None, Ours::Nothing);
        assert_eq!((told(&mut reports), machines.picture(&key).map(|known| known.run)), (vec![], Some(Run::Running)));
        machines.are(third, Vec::new());
        assert_eq!(told(&mut reports), ["gone"]);
        // Nor does one that has gone come back by them.
        machines.are(second, vec![picture(&key, Run::Running)]);
        assert!(told(&mut reports).is_empty() && machines.picture(&key).is_none());
        let fourth = machines.asking();
        machines.are(fourth, vec![picture(&key, Run::Running)]);
        assert_eq!(told(&mut reports), ["seen", "active"]);
        // What a verb has done since is not in them either.
        let fifth = machines.asking();
        assert!(machines.begin(&key));
        machines.end(&key);
        machines.are(fifth, vec![picture(&key, Run::Off { forced: true })]);
        assert_eq!(machines.picture(&key).map(|known| known.run), Some(Run::Running));
    }
}
