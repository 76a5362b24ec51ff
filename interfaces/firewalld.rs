//! firewalld on the system bus, as networks need it: which of the host's devices is in which of its zones. It is never started.

use async_trait::async_trait;
use futures_util::stream::{Stream, StreamExt as _, select};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use virt_drivers::network::zones::{Refused, Zones};
use zbus::proxy::{CacheProperties, MethodFlags};
use zbus::{Connection, MatchRule, Message, MessageStream, Proxy, fdo};

const NAME: &str = "org.fedoraproject.FirewallD1";
const PATH: &str = "/org/fedoraproject/FirewallD1";
const ZONES: &str = "org.fedoraproject.FirewallD1.zone";

/// How long firewalld may take to answer: while it begins, or reads its configuration again, it answers nobody.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take that has not answered what was asked before.
const AGAIN: Duration = Duration::from_millis(500);

/// The way to firewalld, by a connection of its own: what virtd tells its clients does not stand before what is asked here.
pub struct Firewalld {
    zones: Proxy<'static>,
    /// What was asked last has not been answered.
    silent: AtomicBool,
    forgotten: watch::Receiver<u64>,
    _reads: JoinSet<()>,
}

impl Firewalld {
    /// By the system bus. Error: it cannot be reached.
    pub async fn connect() -> zbus::Result<Firewalld> {
        let late = |_| zbus::Error::Failure(format!("the bus has not answered for {} s", PATIENCE.as_secs()));
        let connecting = async {
            let connection = Connection::system().await?;
            let rule = || MatchRule::builder().msg_type(zbus::message::Type::Signal);
            let comes = rule().sender("org.freedesktop.DBus").interface("org.freedesktop.DBus");
            let comes = comes.member("NameOwnerChanged").arg(0, NAME).build()?;
            let tells = rule().sender(NAME).path(PATH).build()?;
            let comes = MessageStream::for_match_rule(comes, &connection, None).await?;
            let tells = MessageStream::for_match_rule(tells, &connection, None).await?;
            let zones = zbus::proxy::Builder::new(&connection).destination(NAME).path(PATH).interface(ZONES);
            let zones = zones.cache_properties(CacheProperties::No).build().await?;
            Ok::<_, zbus::Error>((zones, select(comes, tells)))
        };
        let (zones, signals) = tokio::time::timeout(PATIENCE, connecting).await.map_err(late)??;
        let (count, forgotten) = watch::channel(0);
        let mut reads = JoinSet::new();
        reads.spawn(read(signals, count));
        Ok(Firewalld { zones, silent: AtomicBool::new(false), forgotten, _reads: reads })
    }

    async fn ask<T>(&self, member: &str, body: &(impl serde::Serialize + zbus::DynamicType)) -> Result<T, Refused>
    where
        T: for<'d> zbus::wire::DynamicDeserialize<'d>,
    {
        let asked = self.zones.call_with_flags(member, MethodFlags::NO_AUTO_START, body);
        let patience = if self.silent.load(Ordering::Relaxed) { AGAIN } else { PATIENCE };
        let asked = tokio::time::timeout(patience, asked).await;
        self.silent.store(asked.is_err(), Ordering::Relaxed);
        match asked {
            Ok(Ok(Some(answer))) => Ok(answer),
            Err(_) | Ok(Ok(None)) => Err(Refused::Silent),
            // The bus has ended the connection, of which whoever hears of firewalld has told: nothing is known of firewalld.
            Ok(Err(zbus::Error::InputOutput(_))) => Err(Refused::Absent),
            Ok(Err(zbus::Error::FDO(error)))
                if matches!(*error, fdo::Error::ServiceUnknown(_) | fdo::Error::NameHasNoOwner(_)) =>
            {
                Err(Refused::Absent)
            }
            Ok(Err(zbus::Error::MethodError(_, Some(why), _))) => Err(Refused::Told(why)),
            Ok(Err(error)) => Err(Refused::Told(error.to_string())),
        }
    }
}

#[async_trait]
impl Zones for Firewalld {
    async fn put(&self, device: &str, zone: &str) -> Result<(), Refused> {
        self.ask::<String>("changeZoneOfInterface", &(zone, device)).await.map(drop)
    }

    async fn take_out(&self, device: &str, zone: &str) -> Result<(), Refused> {
        self.ask::<String>("removeInterface", &(zone, device)).await.map(drop)
    }

    async fn zone_of(&self, device: &str) -> Result<String, Refused> {
        self.ask("getZoneOfInterface", &(device,)).await
    }

    async fn known(&self) -> Result<Vec<String>, Refused> {
        self.ask("getZones", &()).await
    }

    async fn answers(&self) {
        let asked = self.zones.call_with_flags("getZones", MethodFlags::NO_AUTO_START, &());
        let answer: zbus::Result<Option<Vec<String>>> = asked.await;
        self.silent.store(false, Ordering::Relaxed);
        tracing::info!(error = ?answer.err(), "firewalld is silent no more");
    }

    fn forgotten(&self) -> watch::Receiver<u64> {
        self.forgotten.clone()
    }
}

/// Reads all signals at once, whatever is asked meanwhile: answers come by the same way, behind them.
async fn read(mut signals: impl Stream<Item = zbus::Result<Message>> + Unpin, count: watch::Sender<u64>) {
    while let Some(signal) = signals.next().await {
        let Some(forgot) = signal.ok().and_then(|signal| forgets(&signal)) else { continue };
        count.send_modify(|count| *count += u64::from(forgot));
    }
}

/// Whether firewalld knows no device's zone since that signal. Nothing if it is not about zones.
fn forgets(signal: &Message) -> Option<bool> {
    match signal.header().member()?.as_str() {
        "NameOwnerChanged" => {
            let (_, _, owner): (String, String, String) = signal.body().deserialize().ok()?;
            Some(!owner.is_empty())
        }
        "Reloaded" => Some(true),
        "InterfaceAdded" | "InterfaceRemoved" | "ZoneOfInterfaceChanged" => Some(false),
        _ => None,
    }
}
