//! Zones of the host's firewall (firewalld): the one that a network's bridge is in decides what it lets pass. How it is asked is
//! its own matter ([`Zones`]).
//!
//! A bridge's zone is lost when firewalld reads its configuration again, or begins anew: the bridge is put there again then. Whoever
//! else moves a bridge means it: that is shown as a problem, and left alone.

use super::Followed;
use super::lock;
use super::make::Maker;
use async_trait::async_trait;
use std::sync::{Arc, Mutex, Weak};
use tokio::sync::{Notify, watch};
use virt_model::driver::network::{Problem, ProblemToken};
use virt_model::network::NetworkDef;
use virt_model::network::forward::Mode;

/// The zone of networks whose definition names none; its file is shipped with virtd.
const OURS: &str = "virt";

/// firewalld, whether it is there or not. It is never started by what it is asked.
#[async_trait]
pub trait Zones: Send + Sync {
    /// Puts a device into a zone, out of any other one.
    async fn put(&self, device: &str, zone: &str) -> Result<(), Refused>;

    /// Takes a device out of that zone.
    async fn take_out(&self, device: &str, zone: &str) -> Result<(), Refused>;

    /// The zone that a device is in; empty for none.
    async fn zone_of(&self, device: &str) -> Result<String, Refused>;

    /// The zones that there are.
    async fn known(&self) -> Result<Vec<String>, Refused>;

    /// Waits until it answers whatever it is asked, or has gone, however long that takes.
    async fn answers(&self);

    /// How often it has forgotten since we listen which device is in which zone. Changed also, to the same, whenever a device may be in
    /// another zone, or firewalld is gone. It ends with the way to it.
    fn forgotten(&self) -> watch::Receiver<u64>;
}

/// Why firewalld has not done what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Nobody is there.
    #[error("firewalld is not there")]
    Absent,
    /// It does not answer in time: it may do so later.
    #[error("firewalld does not answer")]
    Silent,
    /// Its own words.
    #[error("firewalld says: {0}")]
    Told(String),
}

/// The bridge of a network with the zone that it is to be in. Nothing where that is no matter of virtd's: the bridge is another's, or
/// the network is `open` and names no zone.
pub(super) fn place(def: &NetworkDef) -> Option<(&str, &str)> {
    let said = def.bridge.as_ref().and_then(|bridge| bridge.zone.as_deref());
    let zone = match def.mode() {
        Mode::Open => said?,
        mode if mode.is_ours() => said.unwrap_or(OURS),
        _ => return None,
    };
    Some((def.bridge_name()?, zone))
}

/// Puts the bridges of networks into their zones. What cannot be done is logged, and [`problem`] tells it. Whether firewalld was
/// silent: that is to be done again, then.
pub(super) async fn put_all(zones: &dyn Zones, networks: &[NetworkDef]) -> bool {
    for (def, (bridge, zone)) in networks.iter().filter_map(|def| Some((def, place(def)?))) {
        let Err(why) = zones.put(bridge, zone).await else { continue };
        if why == Refused::Absent {
            return false;
        }
        tracing::warn!(network = %def.name, bridge, zone, %why, "its bridge is not put into the zone");
        if why == Refused::Silent {
            return true;
        }
    }
    false
}

/// Takes the bridge of a network that is about to go out of its zone; out of another's it is not taken.
pub(super) async fn take_out(zones: &dyn Zones, def: &NetworkDef) {
    let Some((bridge, zone)) = place(def) else { return };
    if let Err(why) = zones.take_out(bridge, zone).await {
        tracing::debug!(network = %def.name, bridge, zone, %why, "its bridge is not taken out of the zone");
    }
}

/// Why what guests send may not pass: the bridge is not in its zone.
pub(super) async fn problem(zones: &dyn Zones, def: &NetworkDef) -> Option<Problem> {
    let (bridge, zone) = place(def)?;
    let lost = |sentence| Some(Problem { token: ProblemToken::ZoneLost, sentence });
    let unknown = |why: Refused| {
        lost(format!(
            "whether the bridge '{bridge}' is in the zone '{zone}' is not known: {why}; see what it does: systemctl status firewalld"
        ))
    };
    let is = match zones.zone_of(bridge).await {
        Err(Refused::Absent) => return None,
        Err(why) => return unknown(why),
        Ok(is) if is == zone => return None,
        Ok(is) if is.is_empty() => "in no zone".to_owned(),
        Ok(is) => format!("in the zone '{is}'"),
    };
    match zones.known().await {
        Err(why) => unknown(why),
        Ok(known) if known.iter().any(|one| one == zone) => lost(format!(
            "firewalld has the bridge '{bridge}' {is}, and not in '{zone}': put it there: {}",
            remedy(bridge, zone)
        )),
        Ok(_) => {
            let missing = match zone {
                OURS => "its file is shipped with virtd",
                _ => "make it (firewall-cmd --permanent --new-zone), or name another in <bridge zone=>",
            };
            lost(format!(
                "firewalld knows no zone '{zone}', into which the bridge '{bridge}' is to be put: {missing}; then have it read: \
                 firewall-cmd --reload"
            ))
        }
    }
}

/// What has a bridge let pass what it is to, where a zone does not; `zone` is the one that it is to be in, if any.
pub(super) fn let_pass(bridge: &str, zone: Option<&str>) -> String {
    match zone.filter(|zone| *zone != OURS) {
        None => format!("have the bridge in a zone that does, as '{OURS}': {}", remedy(bridge, OURS)),
        Some(zone) => format!(
            "have the zone '{zone}' do so (firewall-cmd --permanent --zone={zone} --set-target=ACCEPT; firewall-cmd --reload), or \
             name no zone in <bridge>"
        ),
    }
}

fn remedy(bridge: &str, zone: &str) -> String {
    format!("firewall-cmd --zone={zone} --change-interface={bridge}")
}

/// Puts the bridges that are there into their zones when it is `due`, for the first time when those have been found that an earlier
/// virtd has made, and again when firewalld has forgotten them, or answers who was silent. Tells all who watch networks when it, or
/// another, may have moved them.
pub(super) async fn hear(
    zones: Arc<dyn Zones>,
    maker: Arc<Maker>,
    turn: Arc<tokio::sync::Mutex<()>>,
    followed: Weak<Mutex<Followed>>,
    due: Arc<Notify>,
) {
    let (mut forgotten, mut done) = (zones.forgotten(), 0);
    due.notified().await;
    let mut is_due = true;
    loop {
        let now = *forgotten.borrow_and_update();
        let mut silent = false;
        if is_due || now != done {
            let _turn = turn.lock().await;
            let maker = maker.clone();
            let mut there = tokio::task::spawn_blocking(move || maker.there()).await.unwrap_or_default();
            let Some(followed) = followed.upgrade() else { return };
            there.retain(|def| lock(&followed).networks.contains_key(&def.uuid));
            silent = put_all(&*zones, &there).await;
            done = now;
        }
        {
            let Some(followed) = followed.upgrade() else { return };
            let mut followed = lock(&followed);
            followed.zones_are_put = true;
            followed.networks.values().for_each(|one| _ = one.told.send_replace(None));
        }
        is_due = tokio::select! {
            () = due.notified() => true,
            () = zones.answers(), if silent => true,
            changed = forgotten.changed() => match changed {
                Ok(()) => silent,
                Err(_) => break,
            },
        };
    }
    tracing::warn!("firewalld is heard no more: no bridge is put into its zones again");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::tests::{House, complete, home, is_inside};
    use std::time::Duration;
    use tokio::sync::mpsc;
    use virt_model::driver::network::NetworkDriver;

    /// A firewalld that is silent until it speaks.
    struct Slow {
        speaks: watch::Sender<bool>,
        put: mpsc::UnboundedSender<(String, String)>,
        forgotten: watch::Sender<u64>,
    }

    impl Slow {
        fn says<T>(&self, answer: T) -> Result<T, Refused> {
            if *self.speaks.borrow() { Ok(answer) } else { Err(Refused::Silent) }
        }
    }

    #[async_trait]
    impl Zones for Slow {
        async fn put(&self, device: &str, zone: &str) -> Result<(), Refused> {
            self.says(())?;
            self.put.send((device.to_owned(), zone.to_owned())).unwrap();
            Ok(())
        }

        async fn take_out(&self, _: &str, _: &str) -> Result<(), Refused> {
            self.says(())
        }

        async fn zone_of(&self, _: &str) -> Result<String, Refused> {
            self.says(OURS.to_owned())
        }

        async fn known(&self) -> Result<Vec<String>, Refused> {
            self.says(vec![OURS.to_owned()])
        }

        async fn answers(&self) {
            self.speaks.subscribe().wait_for(|speaks| *speaks).await.unwrap();
        }

        fn forgotten(&self) -> watch::Receiver<u64> {
            self.forgotten.subscribe()
        }
    }

    #[tokio::test]
    async fn a_bridge_is_put_into_its_zone_when_firewalld_answers_again() {
        if !is_inside("network::zones::tests::a_bridge_is_put_into_its_zone_when_firewalld_answers_again") {
            return;
        }
        let (house, (put, mut puts)) = (House::new(), mpsc::unbounded_channel());
        let slow = Arc::new(Slow { speaks: watch::Sender::new(false), put, forgotten: watch::Sender::new(0) });
        let networks = house.networks().with_zones(slow.clone());
        assert!(networks.find().await.is_empty());
        let def = complete(&home(), &networks).await;
        networks.start(&def, 7).await.unwrap();
        assert!(puts.is_empty(), "nobody could tell it");
        slow.speaks.send_replace(true);
        let put = tokio::time::timeout(Duration::from_secs(60), puts.recv()).await;
        let (device, zone) = put.expect("it is told again").unwrap();
        assert_eq!((Some(&*device), &*zone), (def.bridge_name(), OURS));
        assert_eq!(networks.problems(&def).await.unwrap(), []);
    }

    #[test]
    fn a_zone_is_named_or_ours_or_no_matter_of_ours() {
        let of = |text: &str| {
            let def = NetworkDef::parse(&format!("<network><name>n</name>{text}</network>")).unwrap();
            place(&def).map(|(bridge, zone)| format!("{bridge} {zone}"))
        };
        let (bridge, named) = ("<bridge name='b0'/>", "<bridge name='b0' zone='lab'/>");
        let net = "<ip address='10.0.0.1' prefix='24'/>";
        for mode in ["<forward/>", "<forward mode='route'/>", ""] {
            assert_eq!(of(&format!("{mode}{bridge}{net}")).as_deref(), Some("b0 virt"), "{mode}");
            assert_eq!(of(&format!("{mode}{named}{net}")).as_deref(), Some("b0 lab"), "{mode}");
        }
        assert_eq!(of(&format!("<forward mode='open'/>{bridge}{net}")), None);
        assert_eq!(of(&format!("<forward mode='open'/>{named}{net}")).as_deref(), Some("b0 lab"));
        assert_eq!(of(&format!("<forward mode='bridge'/>{bridge}")), None);
    }
}
