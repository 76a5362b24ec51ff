//! Secrets through the bus: their objects and signals, who may do what, who names them, and what is left of them whoever is killed.

use crate::common::client::{Client, Refusal, Watch, descriptor, options};
use crate::common::snapshots::with;
use crate::common::users::BOB;
use crate::common::{Daemon, Setup, have};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use zbus::wire::Fd;
use zbus::{Message, OwnedObjectPath, Variant};

const NEEDS_PASSWORD: &str = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired";
const UUID: &str = "0a81f5b2-8403-7b23-c8d6-21ccc2f80d6f";
const SESAME: &[u8] = b"open sesame, please";

/// A secret's document.
fn xml(attributes: &str, uuid: &str, volume: &str) -> String {
    format!("<secret {attributes}><uuid>{uuid}</uuid><usage type='volume'><volume>{volume}</volume></usage></secret>")
}

/// A machine in memory whose disk names a secret by what it is for.
fn machine(volume: &str) -> String {
    format!(
        "<domain type='test'><name>web</name><memory>65536</memory><os><type>hvm</type></os><devices><disk type='file'>\
         <source file='{volume}'><encryption format='luks'><secret type='passphrase' usage='{volume}'/></encryption></source>\
         <target dev='vda'/></disk></devices></domain>"
    )
}

/// A secret as a client sees it.
struct Seen {
    client: Client,
    path: String,
}

impl Seen {
    async fn define(client: &Client, xml: &str) -> Result<Seen, Refusal> {
        let reply = client.call("/org/virt", "org.virt.Manager.Secret.DefineSecret", &(xml, options([]))).await?;
        let path = reply.body().deserialize::<OwnedObjectPath>().expect("o").to_string();
        Ok(Seen { client: client.clone(), path })
    }

    /// That of [`UUID`], which need not be there.
    fn usual(client: &Client) -> Seen {
        Seen { client: client.clone(), path: format!("/org/virt/secret/_{}", UUID.replace('-', "_")) }
    }

    async fn call<B>(&self, method: &str, body: &B) -> Result<Message, Refusal>
    where
        B: serde::Serialize + zbus::wire::DynamicType,
    {
        self.client.call(&self.path, &format!("org.virt.Secret.{method}"), body).await
    }

    async fn set(&self, value: &[u8]) -> Result<(), Refusal> {
        self.call("SetValue", &(value, options([]))).await.map(drop)
    }

    async fn value(&self) -> Result<Vec<u8>, Refusal> {
        Ok(self.call("GetValue", &(options([]),)).await?.body().deserialize().expect("ay"))
    }

    async fn undefine(&self, force: bool) -> Result<(), Refusal> {
        self.call("Undefine", &(with([("force", force)]),)).await.map(drop)
    }

    async fn property<T>(&self, name: &str) -> T
    where
        T: TryFrom<zbus::OwnedVariant>,
        T::Error: std::fmt::Debug,
    {
        self.client.property(&self.path, "org.virt.Secret", name).await
    }

    async fn can(&self, method: &str) -> String {
        self.call("Can", &(method,)).await.expect("told").body().deserialize().expect("s")
    }

    async fn users(&self) -> Vec<(OwnedObjectPath, String, String)> {
        self.property("Users").await
    }

    async fn is_there(&self) -> bool {
        self.call("Can", &("GetXML",)).await.is_ok()
    }
}

async fn client(daemon: &Daemon) -> Client {
    Client { connection: daemon.connect().await }
}

/// The signals of this secret up to and with `last`: the member, and the event that it tells.
async fn told(watch: &mut Watch, path: &str, last: &str) -> Vec<String> {
    let mut seen: Vec<String> = Vec::new();
    while seen.last().is_none_or(|seen| seen != last) {
        let message = watch.next().await;
        let (header, body) = (message.header(), message.body());
        let (member, of) = (header.member().expect("a member").to_string(), header.path().expect("a path").to_string());
        match &*member {
            "InterfacesAdded" => {
                type All = std::collections::HashMap<String, std::collections::HashMap<String, zbus::OwnedVariant>>;
                let (added, _): (OwnedObjectPath, All) = body.deserialize().expect("oa{sa{sv}}");
                seen.extend((added.as_str() == path).then_some(member));
            }
            "PropertiesChanged" if of == path => seen.push(member),
            "Lifecycle" if of == path => {
                let (event, detail): (String, String) = body.deserialize().expect("ss");
                seen.push(format!("{event} {detail}").trim_end().to_owned());
            }
            "SecretLifecycle" => {
                let (of, uuid, event): (OwnedObjectPath, String, String) = body.deserialize().expect("oss");
                assert_eq!((of.as_str(), of.as_str().ends_with(&uuid.replace('-', "_"))), (path, true));
                seen.push(format!("all: {event}"));
            }
            _ => {}
        }
    }
    seen
}

/// And no more than 64 KiB of it.
async fn a_value_comes_by_descriptor(one: &Seen) {
    let (ear, mut mouth) = std::io::pipe().unwrap();
    mouth.write_all(b"by a pipe\n").unwrap();
    drop(mouth);
    let ear = std::fs::File::from(std::os::fd::OwnedFd::from(ear));
    one.call("SetValueFromFD", &(descriptor(&ear), options([]))).await.expect("set");
    assert_eq!(one.value().await.expect("told"), b"by a pipe\n");
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[7; 65537]).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    let fd: Fd<'static> = descriptor(&file);
    let (error, why) = one.call("SetValueFromFD", &(fd, options([]))).await.expect_err("too large");
    assert!(error.ends_with("InvalidArgument") && why.contains("65536"), "{error}: {why}");
    assert_eq!(one.set(&[7; 65537]).await.expect_err("too large").0, "org.virt.Error.InvalidArgument");
    assert_eq!(one.value().await.expect("told"), b"by a pipe\n", "what is refused changes nothing");
    one.set(&[7; 65536]).await.expect("set");
    assert_eq!(one.value().await.expect("told"), [7; 65536]);
}

/// What is private is told to nobody, and stays private; nor does another take its name.
async fn what_is_private_stays_so(root: &Client, one: &Seen) {
    Seen::define(root, &xml("private='yes'", UUID, "/srv/a.img")).await.expect("redefined");
    let (error, why) = one.value().await.expect_err("private");
    assert!(error.ends_with("AccessDenied") && why.contains("root included"), "{error}: {why}");
    let lifted = Seen::define(root, &xml("private='no'", UUID, "/srv/a.img")).await.err().expect("refused");
    assert_eq!(lifted.0, "org.virt.Error.OperationInvalid", "{}", lifted.1);
    let taken = Seen::define(root, &xml("", "1a81f5b2-8403-7b23-c8d6-21ccc2f80d6f", "/srv/a.img")).await;
    assert_eq!(taken.err().expect("taken").0, "org.virt.Error.SecretExists");
    let odd = Seen::define(root, "<secret><value>x</value></secret>").await.err().expect("refused");
    assert_eq!(odd.0, "org.virt.Error.ConfigInvalid", "{}", odd.1);
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_defined_set_read_and_found_again() {
    let Some(mut daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let root = client(&daemon).await;
    let mut watch = root.watch().await;
    let one = Seen::define(&root, &xml("private='no'", UUID, "/srv/a.img")).await.expect("defined");
    assert_eq!(one.path, Seen::usual(&root).path);
    let signals = told(&mut watch, &one.path, "all: defined").await;
    assert_eq!(signals, ["InterfacesAdded", "defined added", "all: defined"]);
    assert_eq!(one.value().await.expect_err("there is none").0, "org.virt.Error.SecretMissing");
    assert_eq!((one.can("GetValue").await.as_str(), one.can("SetValue").await.as_str()), ("na", "yes"));
    assert!(!one.property::<bool>("HasValue").await && one.property::<u64>("ValueChanged").await == 0);

    one.set(SESAME).await.expect("set");
    let signals = told(&mut watch, &one.path, "all: value-changed").await;
    assert_eq!(signals, ["PropertiesChanged", "value-changed", "all: value-changed"]);
    assert_eq!(one.value().await.expect("told"), SESAME);
    assert!(
        one.property::<bool>("HasValue").await && one.property::<u64>("ValueChanged").await > 1_600_000_000_000_000
    );
    let protection: String = one.property("Protection").await;
    let sealed = have(&["systemd-creds"]);
    assert!(["tpm2", "host-key"].contains(&protection.as_str()) || !sealed && protection == "file", "{protection}");

    a_value_comes_by_descriptor(&one).await;

    what_is_private_stays_so(&root, &one).await;

    // Look-up, and an ephemeral one, which is never on disk.
    let short = Seen::define(&root, "<secret ephemeral='yes'><description>for a while</description></secret>").await;
    let short = short.expect("defined");
    short.set(SESAME).await.expect("set");
    assert_eq!(short.property::<String>("Protection").await, "memory");
    let by_usage = root.call("/org/virt", "org.virt.Manager.Secret.GetSecretByUsage", &("volume", "/srv/a.img")).await;
    assert_eq!(by_usage.expect("there").body().deserialize::<OwnedObjectPath>().expect("o").as_str(), one.path);
    let none = root.call("/org/virt", "org.virt.Manager.Secret.GetSecret", &("2a81f5b2-8403-7b23-c8d6-21ccc2f80d6f",));
    assert_eq!(none.await.expect_err("none").0, "org.virt.Error.NoSuchSecret");
    let listed = root.call("/org/virt", "org.virt.Manager.Secret.ListSecrets", &(options([]),)).await.expect("told");
    let listed: Vec<(OwnedObjectPath, String, String, String)> = listed.body().deserialize().expect("a(osss)");
    assert_eq!(listed.len(), 2);
    let first = listed.iter().find(|(path, ..)| path.as_str() == one.path).expect("listed");
    assert_eq!((&*first.1, &*first.2, &*first.3), (UUID, "volume", "/srv/a.img"));

    daemon.kill_virtd().await;
    daemon.start_virtd().await;
    let root = client(&daemon).await;
    let one = Seen::usual(&root);
    assert!(one.property::<bool>("HasValue").await && one.property::<bool>("Private").await);
    assert_eq!(one.property::<String>("Protection").await, protection);
    let gone = Seen { client: root.clone(), path: short.path };
    assert!(!gone.is_there().await, "an ephemeral secret ends with virtd");
    one.undefine(false).await.expect("nobody names it");
    assert!(!one.is_there().await);
    assert_eq!(files(&daemon), Vec::<PathBuf>::new());
    let log = daemon.log();
    assert!(!log.contains("sesame") && !log.contains("by a pipe"), "{log}");
}

/// What is on disk of secrets.
fn files(daemon: &Daemon) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(daemon.root().join("var/lib/virt/secrets")).expect("a folder");
    entries.map(|entry| entry.expect("an entry").path()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_names_a_secret_is_shown_and_holds_it() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let owner = client(&daemon).await;
    let domain = owner.define(&machine("/srv/a.img")).await.expect("defined");
    let one = Seen::define(&owner, &xml("", UUID, "/srv/a.img")).await.expect("defined");
    let user =
        |how: &str| (OwnedObjectPath::try_from(&*domain.path).expect("a path"), "vda".to_owned(), how.to_owned());
    assert_eq!(one.users().await, [user("config")]);
    one.set(SESAME).await.expect("the owner of the bus may");
    assert_eq!(one.value().await.expect("told"), SESAME);
    let mut watch = owner.watch().await;
    domain.run("Start").await.expect("started");
    assert_eq!(told(&mut watch, &one.path, "PropertiesChanged").await, ["PropertiesChanged"]);
    assert_eq!(one.users().await, [user("live"), user("config")]);
    for force in [false, true] {
        let (error, why) = one.undefine(force).await.expect_err("it is needed");
        assert!(error.ends_with("InUse") && why.contains("domain 'web' (vda, live)"), "{error}: {why}");
        let check = one.call("CheckUndefine", &(with([("force", force)]),)).await.expect("told");
        let check: std::collections::HashMap<String, zbus::OwnedVariant> = check.body().deserialize().expect("a{sv}");
        assert_eq!(
            (&*check["possible"], &*check["error"]),
            (&Variant::from(false), &Variant::from("org.virt.Error.InUse"))
        );
    }
    domain.run("Destroy").await.expect("stopped");
    assert_eq!(one.undefine(false).await.expect_err("it is named").0, "org.virt.Error.InUse");
    one.undefine(true).await.expect("the configuration is left without it");
    let again = Seen::define(&owner, &xml("", UUID, "/srv/a.img")).await.expect("defined");
    assert!(!again.property::<bool>("HasValue").await, "of the one before nothing is left");
    assert_eq!(again.users().await, [user("config")]);
    domain.run("Undefine").await.expect("undefined");
    assert_eq!(again.users().await, []);
    again.undefine(false).await.expect("nobody names it any more");
}

#[tokio::test]
async fn who_may_not_is_denied_and_changes_nothing() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let (root, bob) = (client(&daemon).await, Client { connection: daemon.connect_as(&BOB).await });
    let (error, why) = Seen::define(&bob, &xml("", UUID, "/srv/a.img")).await.err().expect("denied");
    assert!(error == NEEDS_PASSWORD && why.contains("org.virt.secret.define") && why.contains(UUID), "{error}: {why}");
    let one = Seen::define(&root, &xml("", UUID, "/srv/a.img")).await.expect("defined");
    one.set(SESAME).await.expect("set");
    let theirs = Seen::usual(&bob);
    for (method, done) in [("set", theirs.set(b"mine now").await), ("delete", theirs.undefine(true).await)] {
        let (error, why) = done.expect_err(method);
        assert!(error == NEEDS_PASSWORD && why.contains(&format!("org.virt.secret.{method}")), "{error}: {why}");
    }
    let (error, why) = theirs.value().await.expect_err("denied");
    assert!(error == NEEDS_PASSWORD && why.contains("org.virt.secret.get"), "{error}: {why}");
    assert_eq!(theirs.can("GetValue").await, "challenge");
    let document = theirs.call("GetXML", &(options([]),)).await.expect("reading what is known is free");
    let document: String = document.body().deserialize().expect("s");
    assert!(document.contains("/srv/a.img") && !document.contains("sesame"), "{document}");
    assert_eq!(one.value().await.expect("told"), SESAME);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_secret_says_so_and_keeps_its_value_to_itself() {
    let Some(mut daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let root = client(&daemon).await;
    let one = Seen::define(&root, &xml("", UUID, "/srv/a.img")).await.expect("defined");
    one.set(SESAME).await.expect("set");
    daemon.kill_virtd().await;
    let document = daemon.root().join(format!("var/lib/virt/secrets/{UUID}.xml"));
    std::fs::write(&document, "<secret><usage type='odd'/></secret>").unwrap();
    daemon.start_virtd().await;
    let root = client(&daemon).await;
    let one = Seen::usual(&root);
    let why: String = one.property("Broken").await;
    assert!(why.contains("one of none, volume"), "{why}");
    let (error, why) = one.value().await.expect_err("nobody knows whether it is private");
    assert!(error.ends_with("OperationInvalid") && why.contains("define it anew"), "{error}: {why}");
    assert_eq!(one.can("GetValue").await, "na");
    let lifted = Seen::define(&root, &xml("private='no'", UUID, "/srv/a.img")).await.err().expect("refused");
    assert_eq!(lifted.0, "org.virt.Error.OperationInvalid", "{}", lifted.1);
    // What is noted of it says otherwise: its uuid alone counts.
    let anew = Seen::define(&root, &xml("private='yes'", UUID, "/srv/b.img")).await.expect("defined anew");
    assert_eq!((anew.property::<String>("Broken").await.as_str(), anew.property::<bool>("HasValue").await), ("", true));
    let names = [("volume", "/srv/a.img"), ("volume", "/srv/b.img")];
    let by_usage = |n: usize| root.call("/org/virt", "org.virt.Manager.Secret.GetSecretByUsage", &names[n]);
    assert_eq!(by_usage(0).await.expect_err("none").0, "org.virt.Error.NoSuchSecret");
    let found = by_usage(1).await.expect("there").body().deserialize::<OwnedObjectPath>().expect("o");
    assert_eq!(found.as_str(), anew.path);
    anew.undefine(false).await.expect("it can be given up");
    assert_eq!(files(&daemon), Vec::<PathBuf>::new());
}

/// S9 of secrets: whichever step virtd is killed at, a secret is as it was or as it is to be, and no value is left behind.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_each_step_it_is_as_before_or_as_wanted() {
    let Some(mut daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    for verb in ["define", "set", "undefine"] {
        for step in 1.. {
            let root = client(&daemon).await;
            let one = Seen::usual(&root);
            if verb != "define" {
                Seen::define(&root, &xml("", UUID, "/srv/a.img")).await.expect("defined");
                one.set(b"before").await.expect("set");
            }
            daemon.at_step(step, &format!("kill -9 {}", daemon.virtd_pid()));
            let path = one.path.clone();
            match verb {
                "define" => {
                    let body = (xml("", UUID, "/srv/a.img"), options([]));
                    root.ask("/org/virt", "org.virt.Manager.Secret.DefineSecret", &body).await;
                }
                "set" => _ = root.ask(&path, "org.virt.Secret.SetValue", &(SESAME, options([]))).await,
                _ => _ = root.ask(&path, "org.virt.Secret.Undefine", &(options([]),)).await,
            }
            let came = daemon.step_came();
            if came {
                daemon.virtd_died().await;
                daemon.start_virtd().await;
            }
            let root = client(&daemon).await;
            let one = Seen::usual(&root);
            match (verb, one.is_there().await) {
                ("define", there) => assert!(!there || !one.property::<bool>("HasValue").await, "step {step}"),
                ("set", there) => {
                    let value = one.value().await.expect("there was one all the time");
                    assert!(there && (value == b"before" || value == SESAME), "step {step}: {value:?}");
                }
                (_, true) => assert_eq!(one.value().await.expect("all of it, or nothing"), b"before", "step {step}"),
                (_, false) => assert_eq!(files(&daemon), Vec::<PathBuf>::new(), "step {step}"),
            }
            if one.is_there().await {
                one.undefine(true).await.expect("undefined");
            }
            if !came {
                assert!(step > 1, "{verb} has steps");
                break;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_administrators_files_become_secrets_once() {
    let Some(mut daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let root = client(&daemon).await;
    root.define(&machine("/srv/a.img")).await.expect("defined");
    // Whose readers would have what the administrator keeps.
    let open =
        Seen::define(&root, &xml("", "1a81f5b2-8403-7b23-c8d6-21ccc2f80d6f", "/srv/b.img")).await.expect("defined");
    daemon.kill_virtd().await;
    let folder = daemon.root().join("etc/virt/secrets");
    std::fs::create_dir_all(&folder).unwrap();
    let put = |name: &str, text: &str, mode: u32| {
        std::fs::write(folder.join(name), text).unwrap();
        std::fs::set_permissions(folder.join(name), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    put("%2Fsrv%2Fa.img", "open sesame, please\n", 0o600);
    put(UUID, "by its uuid", 0o600);
    put("open-to-all", "seen", 0o644);
    put("%2Fsrv%2Fb.img", "not for its readers", 0o600);
    daemon.start_virtd().await;
    let root = client(&daemon).await;
    // Whoever defines one waits until they are taken in.
    let one = Seen::define(&root, "<secret/>").await.expect("defined");
    one.undefine(false).await.expect("undefined");
    let by_usage = root.call("/org/virt", "org.virt.Manager.Secret.GetSecretByUsage", &("volume", "/srv/a.img")).await;
    let path = by_usage.expect("taken in").body().deserialize::<OwnedObjectPath>().expect("o").to_string();
    let taken = Seen { client: root.clone(), path };
    assert!(taken.property::<bool>("HasValue").await && taken.property::<bool>("Private").await);
    assert_eq!(taken.users().await.len(), 1);
    assert!(Seen::usual(&root).property::<bool>("HasValue").await);
    let left = || {
        let names = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    };
    assert_eq!(left(), ["%2Fsrv%2Fb.img", "open-to-all"], "what others can read is no secret");
    let open = Seen { client: root.clone(), ..open };
    assert!(!open.property::<bool>("HasValue").await);
    let log = daemon.log();
    assert!(log.contains("1a81f5b2-8403-7b23-c8d6-21ccc2f80d6f, which is not private"), "{log}");
    open.undefine(false).await.expect("undefined");
    std::fs::remove_file(folder.join("%2Fsrv%2Fb.img")).expect("removed");
    assert!(log.contains("'/srv/a.img' is taken from its file") && log.contains("make it mode 0600"), "{log}");
    assert!(!log.contains("sesame"), "{log}");

    // As if virtd had been killed before the file was removed; and a file that says otherwise.
    daemon.kill_virtd().await;
    put("%2Fsrv%2Fa.img", "open sesame, please\n", 0o600);
    put(UUID, "another", 0o600);
    put("a%0Ab", "for what cannot be written down", 0o600);
    daemon.start_virtd().await;
    let root = client(&daemon).await;
    let one = Seen::define(&root, "<secret/>").await.expect("defined");
    one.undefine(false).await.expect("undefined");
    assert_eq!(left(), [UUID, "a%0Ab", "open-to-all"]);
    let listed = root.call("/org/virt", "org.virt.Manager.Secret.ListSecrets", &(options([]),)).await.expect("told");
    let listed: Vec<(OwnedObjectPath, String, String, String)> = listed.body().deserialize().expect("a(osss)");
    assert_eq!(listed.len(), 2);
    assert!(daemon.log().contains("has a value of its own"), "{}", daemon.log());
}
