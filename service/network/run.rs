//! Networks started and destroyed, and what befalls those that are there.

use super::manage::others;
use super::{CheckedNetwork, Network, State, failed};
use crate::authz::{Action, Answer, Caller};
use crate::choices::Choice;
use crate::error::{Error, Result};
use crate::frames::{self, Changeable as _};
use crate::lock::lock;
use crate::object::Usage;
use crate::verb;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use virt_model::driver::network::{NetworkError, NetworkReport};
use virt_model::network::NetworkDef;

/// What guests can cause without end is told at most so often.
const PACE: Duration = Duration::from_millis(500);

impl Network {
    /// Makes it, all or nothing.
    pub async fn start(self: &Arc<Self>, caller: &Caller) -> Result<()> {
        frames::short(self, caller, &verb::NETWORK_START, self.make()).await
    }

    /// What a start would meet. Changes nothing.
    pub async fn check_start(&self, caller: &Caller) -> Result<CheckedNetwork> {
        frames::beside(self, caller, &verb::CHECK_START, async {
            let refusal = match self.to_start() {
                Ok(def) => self.refused_by_host(caller, &def).await.err(),
                Err(refusal) => Some(refusal),
            };
            Ok(CheckedNetwork { refusal, users: self.users() })
        })
        .await
    }

    /// What a start would be refused for. The host is looked at by programs that root runs, so only for who may start it;
    /// others are told what is known without them.
    async fn refused_by_host(&self, caller: &Caller, def: &Arc<NetworkDef>) -> Result<()> {
        if self.shared.authority.can(caller, Action::NetworkStart, &self.subject()).await == Answer::Yes {
            let (whole, _choice) = self.completed(def).await?;
            return self.driver().can_start(&whole).await.map_err(|e| self.failed("start", e));
        }
        match self.driver().check(def) {
            findings if findings.is_empty() => Ok(()),
            findings => Err(self.failed("start", NetworkError::Config(findings))),
        }
    }

    /// What is stored. Error: it is active already.
    fn to_start(&self) -> Result<Arc<NetworkDef>> {
        let state = lock(&self.state);
        match (&state.live, &state.stored) {
            (None, Some(def)) => Ok(def.clone()),
            _ => Err(Error::OperationInvalid(format!("network '{}' is active already", self.name))),
        }
    }

    /// The same with what it leaves open and the host chooses once: a bridge's name and address, and a net, if it awaits one.
    /// That is no other's as long as the choice is kept.
    pub(super) async fn completed(&self, def: &Arc<NetworkDef>) -> Result<(Arc<NetworkDef>, Choice)> {
        let _choosing = self.shared.choices.turn().await;
        let others = others(&self.shared, &self.networks, self.uuid);
        let nets: Vec<_> = others.iter().flat_map(|def| def.addresses()).map(|(_, net)| net).collect();
        let bridges: Vec<String> = others.iter().filter_map(|def| def.bridge_name().map(str::to_owned)).collect();
        let mut whole = NetworkDef::clone(def);
        self.driver().complete(&mut whole, &bridges).await;
        if whole.awaits_a_net() {
            whole.take_net(self.driver().free_net(&nets).await.map_err(|e| self.failed("start", e))?);
        }
        let whole = if whole == **def { def.clone() } else { Arc::new(whole) };
        Ok((whole.clone(), self.shared.choices.keep(whole)))
    }

    /// For who has the turn.
    pub(super) async fn make(self: &Arc<Self>) -> Result<()> {
        let stored = self.to_start()?;
        let (def, _choice) = self.completed(&stored).await?;
        if Arc::ptr_eq(&stored, &def) {
            return self.make_of(def).await;
        }
        // What was chosen is stored before it is made: it is the same from now on.
        self.store(&def).await?;
        self.commit(Vec::new(), |state| state.stored = Some(def.clone()));
        let made = self.make_of(def).await;
        if made.is_err() {
            // What it could not be made of is not kept: the next start chooses anew.
            match self.store(&stored).await {
                Ok(()) => self.commit(Vec::new(), |state| state.stored = Some(stored)),
                Err(error) => tracing::warn!(network = self.name, %error, "what was chosen for it stays"),
            }
        }
        made
    }

    /// Makes what that says.
    pub(super) async fn make_of(self: &Arc<Self>, def: Arc<NetworkDef>) -> Result<()> {
        let started = self.driver().start(&def, self.owner).await;
        started.map_err(|e| failed(&self.name, "start", e))?;
        crate::fail_point::reached();
        let looked = self.driver().problems(&def).await;
        let leases = self.driver().leases(&def).await.unwrap_or_default();
        let devices = self.driver().forward_devices(self.uuid).await;
        self.commit(vec![("started", "booted")], |state| {
            state.has_looked(&self.name, looked);
            (state.live, state.devices, state.leases) = (Some(def), devices.into(), leases.into());
        });
        // Guests that were in it before are in it again.
        let def = self.live()?;
        self.plug_again(&def).await;
        self.follow();
        Ok(())
    }

    /// Plugs in the cards of guests that are to be in it and are in no bridge.
    async fn plug_again(&self, def: &NetworkDef) {
        self.driver().plug(def, self.shared.plugs.cards_in(def)).await;
    }

    /// The same once the machines are known: an earlier virtd may have ended before it did.
    pub(super) fn plug_again_soon(self: &Arc<Self>) {
        let network = self.clone();
        tokio::spawn(async move {
            match frames::take_turn(&*network, verb::NETWORK_START.word, &CancellationToken::new()).await {
                Ok(_turn) => {
                    if let Ok(def) = network.live() {
                        network.plug_again(&def).await;
                    }
                }
                Err(error) => tracing::warn!(network = network.name, %error, "guests are not plugged in again"),
            }
        });
    }

    /// Takes it away. `force`: also from guests that are in it, whose cards then have no link until it is started again.
    pub async fn destroy(self: &Arc<Self>, caller: &Caller, force: bool) -> Result<()> {
        frames::short(self, caller, &verb::NETWORK_DESTROY, async {
            // First nobody is plugged in any more: who is about to be has said so before, and is found among its users.
            self.commit(Vec::new(), |state| state.going = true);
            let stopped = self.stop(force).await;
            let events = if stopped.is_ok() { vec![("stopped", "destroyed")] } else { Vec::new() };
            self.commit(events, |state| {
                state.going = false;
                if stopped.is_ok() {
                    state.has_stopped();
                }
            });
            stopped
        })
        .await
    }

    async fn stop(&self, force: bool) -> Result<()> {
        if !force {
            self.is_not_used("destroy", Usage::Live)?;
        }
        self.driver().stop(self.uuid).await.map_err(|e| self.failed("destroy", e))?;
        crate::fail_point::reached();
        Ok(())
    }

    /// What that would meet.
    pub async fn check_destroy(&self, caller: &Caller, force: bool) -> Result<CheckedNetwork> {
        frames::beside(self, caller, &verb::CHECK_DESTROY, async {
            let used = if force { Ok(()) } else { self.is_not_used("destroy", Usage::Live) };
            let refusal = self.live().and(used).err();
            Ok(CheckedNetwork { refusal, users: self.users() })
        })
        .await
    }

    /// Follows what befalls it, until it is stopped.
    pub(super) fn follow(self: &Arc<Self>) {
        let network = self.clone();
        tokio::spawn(async move {
            let mut reports = network.driver().watch(network.uuid).await;
            while let Some(report) = reports.recv().await {
                if report == NetworkReport::Gone {
                    return network.has_gone().await;
                }
                network.heard(report).await;
                tokio::time::sleep(PACE).await;
            }
        });
    }

    /// It went by itself: what is left of it is taken away.
    async fn has_gone(self: &Arc<Self>) {
        let Ok(live) = self.live() else { return };
        let turn = frames::take_turn(&**self, verb::NETWORK_DESTROY.word, &CancellationToken::new()).await;
        // It may have been destroyed, and started again, while others had the turn.
        if turn.is_err() || !self.live().is_ok_and(|now| Arc::ptr_eq(&now, &live)) {
            return;
        }
        tracing::warn!(network = self.name, "what it was in has ended, and it with that");
        if let Err(error) = self.driver().stop(self.uuid).await {
            tracing::warn!(network = self.name, %error, "what is left of it stays");
        }
        self.commit(vec![("stopped", "failed")], State::has_stopped);
    }

    async fn heard(&self, report: NetworkReport) {
        let mut is_told = false;
        while !is_told {
            let Ok(live) = self.live() else { return };
            // What was found of one that has been changed or destroyed meanwhile says nothing.
            let is_same = |state: &State| state.live.as_ref().is_some_and(|now| Arc::ptr_eq(now, &live));
            match report {
                NetworkReport::Leases => match self.driver().leases(&live).await {
                    Ok(leases) => self.commit(Vec::new(), |state| {
                        is_told = is_same(state);
                        if is_told {
                            state.leases = leases.into();
                        }
                    }),
                    Err(error) => {
                        return tracing::warn!(network = self.name, %error, "its leases cannot be read");
                    }
                },
                NetworkReport::Gone => return,
                NetworkReport::ServerEnded | NetworkReport::Changed => {
                    let looked = self.driver().problems(&live).await;
                    self.commit(Vec::new(), |state| {
                        is_told = is_same(state);
                        if is_told {
                            state.has_looked(&self.name, looked);
                        }
                    });
                }
            }
        }
    }
}
