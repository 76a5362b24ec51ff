//! The guest's side, for tests: what a real guest or its hypervisor would do by itself.

use super::guest::{Asked, Machine};
use std::sync::Arc;
use virt_model::driver::{DriverEvent, Exit};
use virt_model::state::{ShutdownBy, Suspended};

/// Makes a guest do things. What it causes is reported before the call returns.
pub struct GuestControl(Arc<Machine>);

impl GuestControl {
    pub(super) fn new(machine: Arc<Machine>) -> Self {
        GuestControl(machine)
    }

    /// The guest powers itself off.
    pub fn power_off(&self) {
        self.0.power_off(ShutdownBy::Guest, false);
    }

    /// The guest reboots by itself; where `on_reboot` ends it, it is told as a power-off.
    pub fn reboot(&self) {
        self.0.guest_reboots();
    }

    /// The guest's kernel panics.
    pub fn panic(&self) {
        self.0.panic();
    }

    /// A disk fails, and its policy is to stop.
    pub fn io_error(&self) {
        self.0.stop(Suspended::IoError);
    }

    /// The watchdog stops the guest.
    pub fn watchdog(&self) {
        self.0.stop(Suspended::Watchdog);
    }

    /// The guest falls asleep.
    pub fn fall_asleep(&self) {
        self.0.fall_asleep();
    }

    /// Something wakes the guest.
    pub fn wake(&self) {
        self.0.wake();
    }

    /// From now on the guest does nothing about being asked to power off or to reboot (or does again).
    pub fn ignore_shutdown(&self, ignore: bool) {
        self.0.set_deaf(ignore);
    }

    /// From now on the hypervisor answers nothing (or does again), as a process under SIGSTOP: only `destroy` works.
    pub fn hang(&self, hang: bool) {
        self.0.set_listening(!hang);
    }

    /// A program in the guest opens the channel of that name, or closes it.
    pub fn open_channel(&self, name: &str, open: bool) {
        self.0.open(name, open);
    }

    /// The hypervisor reports that, whether it is so or not.
    pub fn report(&self, event: DriverEvent) {
        self.0.report(event);
    }

    /// The hypervisor dies.
    pub fn die(&self, last_words: &str) {
        self.0.end(Exit::Died(last_words.to_owned()));
        self.0.set_listening(true);
    }

    /// The hypervisor ends in order, and not because it was asked to.
    pub fn quit(&self) {
        self.0.end(Exit::Orderly);
        self.0.set_listening(true);
    }

    /// What the guest was last asked.
    pub fn asked(&self) -> Option<Asked> {
        self.0.asked()
    }

    /// How often its hypervisor was asked for a group of numbers.
    pub fn samples(&self) -> u32 {
        self.0.samples()
    }

    /// How often its machine was reset, or it rebooted.
    pub fn resets(&self) -> u32 {
        self.0.resets()
    }
}
