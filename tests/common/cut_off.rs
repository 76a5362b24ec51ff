//! What is cut off: an operation is tried once for each step that it has, and somebody is killed there.

use super::Daemon;
use super::client::{Client, Domain};
use super::guest::Tick;
use std::ops::Range;

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victims {
    Virtd,
    Qemu,
    Both,
}

impl Victims {
    /// Whether virtd is among them.
    pub fn have_virtd(self) -> bool {
        self != Victims::Qemu
    }

    /// Whether the guest's QEMU is among them.
    pub fn have_qemu(self) -> bool {
        self != Victims::Virtd
    }
}

/// The steps of an operation, from the first on.
pub struct Steps {
    what: String,
    victims: Victims,
    /// The operation has more than the first and fewer than the last, or the test is no test of it.
    thought: Range<u32>,
    now: u32,
    /// Whether it had been done at the step before, where that is told.
    was_done: Option<bool>,
}

impl Steps {
    /// Of an operation that is thought to have so many.
    pub fn of(what: impl Into<String>, victims: Victims, thought: Range<u32>) -> Steps {
        Steps { what: what.into(), victims, thought, now: 0, was_done: None }
    }

    /// Goes to the next one; its number.
    pub fn next(&mut self) -> u32 {
        self.now += 1;
        assert!(self.now < self.thought.end, "{} has more than {} steps", self.what, self.now - 1);
        self.now
    }

    /// Where it is now, for what a test says when it fails.
    pub fn when(&self) -> String {
        format!("{}, {:?} killed at {}", self.what, self.victims, self.now)
    }

    /// Has them killed at this step of what is done from now on. `guest`: its name.
    pub fn kill(&self, daemon: &Daemon, guest: &str) {
        let mut pids = Vec::new();
        if self.victims.have_qemu() {
            pids.push(daemon.qemu_of(guest).expect("it runs").to_string());
        }
        if self.victims.have_virtd() {
            pids.push(daemon.virtd_pid().to_string());
        }
        daemon.at_step(self.now, &format!("kill -9 {}", pids.join(" ")));
    }

    /// Whether they were killed, once the client has its answer. If not, it has no such step, and `done`, all of it, as it was at the
    /// step before.
    pub async fn struck(&self, daemon: &mut Daemon, done: bool) -> bool {
        let when = self.when();
        if !daemon.step_came() {
            assert!(done, "{when}: it failed, and nobody was killed");
            assert!(self.now > self.thought.start, "{when}: it has fewer steps than thought");
            assert_ne!(self.was_done, Some(false), "{when}: it is done at once");
            println!("{when}: {} steps", self.now - 1);
            return false;
        }
        if self.victims.have_virtd() {
            daemon.virtd_died().await;
        }
        true
    }

    /// As `struck`, and virtd has been started again if it was killed.
    pub async fn came(&self, daemon: &mut Daemon, domain: &mut Domain, done: bool) -> bool {
        let struck = self.struck(daemon, done).await;
        if struck && self.victims.have_virtd() {
            daemon.start_virtd().await;
            domain.client = Client { connection: daemon.connect().await };
        }
        struck
    }

    /// Says whether it has been done, this time: what is done at one step is done at each later one.
    pub fn is_done(&mut self, done: bool) {
        assert!(done || self.was_done != Some(true), "{}: it had been done before", self.when());
        self.was_done = Some(done);
    }

    /// The guest goes on, or is off if it has been killed.
    pub async fn is_as_it_was(&self, domain: &Domain, tick: &Tick) {
        if self.victims.have_qemu() {
            domain.is_off().await;
            assert_ne!(domain.state().await.1, "saved", "{}", self.when());
        } else {
            assert_eq!(domain.state().await.0, "running", "{}", self.when());
            tick.goes_on().await;
        }
    }
}
