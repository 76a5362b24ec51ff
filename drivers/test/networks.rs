//! Networks in memory, for clients that are written against the test driver: each is there when it is started, with its bridge's name and
//! addresses, and nothing of it is on the host. They end with virtd.

use async_trait::async_trait;
use std::collections::HashMap;
use std::sync::Mutex;
use tokio::sync::mpsc;
use uuid::Uuid;
use virt_model::driver::network::{
    Lease, NetworkDriver, NetworkError, NetworkReport, PartlySeen, PluggedCard, Problem,
};
use virt_model::lock::lock;
use virt_model::network::address::Net;
use virt_model::network::forward::{ForwardDevice, Mode};
use virt_model::network::{NetworkDef, standing};
use virt_model::xml::Finding;

/// See the module.
#[derive(Debug, Default)]
pub struct TestNetworks(Mutex<HashMap<Uuid, Playing>>);

/// One that is there.
#[derive(Debug)]
struct Playing {
    def: NetworkDef,
    /// Who watches it is told nothing, until it is stopped.
    watched: Option<mpsc::Sender<NetworkReport>>,
}

#[async_trait]
impl NetworkDriver for TestNetworks {
    fn check(&self, def: &NetworkDef) -> Vec<Finding> {
        let mut log = standing::check(def);
        if def.mode() == Mode::Hostdev {
            let at = def.forward.as_ref().map(|forward| forward.at.clone()).unwrap_or_default();
            log.push(Finding::unsupported(&at, "networks in memory have no devices of the host's to give to guests"));
        }
        log
    }

    async fn complete(&self, def: &mut NetworkDef, taken: &[String]) {
        def.complete(|name| taken.iter().any(|one| one == name));
    }

    async fn free_net(&self, taken: &[Net]) -> Result<Net, NetworkError> {
        let free = Net::first_free(|net| taken.iter().any(|other| other.overlaps(net)));
        free.ok_or_else(|| NetworkError::Failed("no net is free: say <ip>".to_owned()))
    }

    async fn can_start(&self, def: &NetworkDef) -> Result<(), NetworkError> {
        let findings = self.check(def);
        if !findings.is_empty() {
            return Err(NetworkError::Config(findings));
        }
        let there = lock(&self.0);
        let bridge = def.bridge_name().filter(|_| def.mode().is_ours());
        let other = there.values().find(|one| bridge.is_some() && one.def.bridge_name() == bridge);
        match other.filter(|one| one.def.uuid != def.uuid) {
            None => Ok(()),
            Some(other) => {
                let (bridge, name) = (bridge.unwrap_or_default(), &other.def.name);
                Err(NetworkError::Failed(format!("network '{name}' has the bridge '{bridge}': name another")))
            }
        }
    }

    async fn start(&self, def: &NetworkDef, _: u32) -> Result<(), NetworkError> {
        self.can_start(def).await?;
        lock(&self.0).insert(def.uuid, Playing { def: def.clone(), watched: None });
        Ok(())
    }

    async fn stop(&self, uuid: Uuid) -> Result<(), NetworkError> {
        lock(&self.0).remove(&uuid);
        Ok(())
    }

    async fn find(&self) -> Vec<(NetworkDef, u32)> {
        Vec::new()
    }

    async fn change(&self, def: &NetworkDef) -> Result<(), NetworkError> {
        if let Some(there) = lock(&self.0).get_mut(&def.uuid) {
            there.def = def.clone();
        }
        Ok(())
    }

    async fn forward_devices(&self, _: Uuid) -> Vec<ForwardDevice> {
        Vec::new()
    }

    async fn plug(&self, _: &NetworkDef, _: Vec<PluggedCard>) {}

    async fn leases(&self, _: &NetworkDef) -> Result<Vec<Lease>, NetworkError> {
        Ok(Vec::new())
    }

    async fn problems(&self, _: &NetworkDef) -> Result<Vec<Problem>, PartlySeen> {
        Ok(Vec::new())
    }

    async fn watch(&self, uuid: Uuid) -> mpsc::Receiver<NetworkReport> {
        let (sender, receiver) = mpsc::channel(1);
        if let Some(there) = lock(&self.0).get_mut(&uuid) {
            there.watched = Some(sender);
        }
        receiver
    }
}
