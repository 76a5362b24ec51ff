//! Pools that are folders of other hosts, as far as no server is needed: what the tools are told, and what becomes of a pool whose
//! server refuses it or never answers. Real ones are mounted in `tests/qemu/shares.rs`.

use crate::common::client::{Client, Refusal, options};
use crate::common::guest::until;
use crate::common::pools::{Pool, STORAGE};
use crate::common::{Daemon, Setup};
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use zbus::{OwnedObjectPath, OwnedVariant};

const SECRET: &str = "5a0b1e0c-9a0d-4b52-9a8e-6f0f7c1d2e3f";
const PASSWORD: &str = "open, sesame";

/// Stands in for each tool that mounts: it notes what it was told, and what is in the file of credentials that it was told of. It then
/// does what its name among the files beside it says: fails, or never comes back.
const MOUNTER: &str = "#!/bin/sh
printf '%s\\n' \"$0\" \"$@\" > HERE/told
env >> HERE/told
file=$(printf '%s\\n' \"$@\" | sed -n 's/.*credentials=\\([^,]*\\).*/\\1/p')
[ -z \"$file\" ] || cat \"$file\" > HERE/credentials
echo $$ > HERE/begun.new; mv HERE/begun.new HERE/begun
[ ! -e HERE/hangs ] || exec sleep 1000
echo 'mount: access denied by server' >&2
exit 32
";
const LISTER: &str = "#!/bin/sh
[ \"$*\" = '--no-headers --exports nas.example.com' ] || exit 1
echo '/export/images 192.0.2.0/24'
echo '/export/media  *'
printf '/export/\\001 *\\n'
";

struct Stage {
    daemon: Daemon,
    client: Client,
    /// Where the tools are, and write.
    tools: PathBuf,
}

impl Stage {
    async fn new() -> Option<Stage> {
        let mut daemon = Daemon::on_system_bus(Setup::default()).await?;
        let tools = daemon.folder().join("tools");
        fs::create_dir(&tools).expect("a folder");
        for (name, script) in [("mount.nfs", MOUNTER), ("mount.cifs", MOUNTER), ("showmount", LISTER)] {
            let tool = tools.join(name);
            fs::write(&tool, script.replace("HERE", &tools.display().to_string())).expect("written");
            fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).expect("set");
        }
        // The next virtd finds them.
        daemon.stop_virtd().await;
        daemon.start_virtd().await;
        let client = Client { connection: daemon.connect().await };
        Some(Stage { daemon, client, tools })
    }

    async fn pool(&self, name: &str, source: &str) -> Pool {
        let folder = self.daemon.folder().join(name);
        let xml = format!(
            "<pool type='netfs'><name>{name}</name><source><host name='nas.example.com'/>{source}</source>\
             <target><path>{}</path></target></pool>",
            folder.display()
        );
        let pool = Pool::of(&self.client, &xml, &folder).await;
        pool.run("Build", options([])).await.expect("its folder is made");
        pool
    }

    /// Each line of what the tool was told.
    fn told(&self) -> Vec<String> {
        fs::read_to_string(self.tools.join("told")).expect("told").lines().map(str::to_owned).collect()
    }

    /// Where the tool is to mount, which is nowhere any more.
    fn aside(&self) -> PathBuf {
        PathBuf::from(&self.told()[2])
    }

    async fn find(&self, xml: &str) -> Result<String, Refusal> {
        let reply = self.client.call("/org/virt", &format!("{STORAGE}.FindSources"), &("netfs", xml)).await?;
        Ok(reply.body().deserialize().expect("s"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_share_that_is_refused_leaves_nothing_and_its_password_is_in_no_argument() {
    let Some(stage) = Stage::new().await else { return };
    let types: HashMap<String, HashMap<String, OwnedVariant>> =
        stage.client.property("/org/virt", STORAGE, "PoolTypes").await;
    assert!(bool::try_from(types["netfs"]["supported"].try_clone().unwrap()).unwrap());
    let pool = stage.pool("nas", "<dir path='/export/images'/><format type='nfs'/><protocol ver='4.1'/>").await;
    let refused = pool.run("Start", options([])).await.expect_err("the server refuses it");
    assert!(
        refused.0.ends_with("StorageFailed") && refused.1.contains("mount: access denied by server"),
        "{refused:?}"
    );
    assert_eq!(pool.get::<String>("State").await, "inactive");
    let told = stage.told();
    assert_eq!(told[1], "nas.example.com:/export/images");
    assert_eq!(told[3..5], ["-o", "nosuid,nodev,noexec,retry=0,vers=4.1"]);
    assert!(!Path::new(&format!("/proc/{}/root{}", stage.daemon.virtd_pid(), told[2])).exists());
    let secret = format!(
        "<secret ephemeral='no' private='yes'><uuid>{SECRET}</uuid><usage type='volume'><volume>nas</volume></usage></secret>"
    );
    let reply = stage.client.call("/org/virt", "org.virt.Manager.Secret.DefineSecret", &(&*secret, options([]))).await;
    let secret: OwnedObjectPath = reply.expect("defined").body().deserialize().expect("o");
    let auth = format!("<auth type='chap' username='virt'><secret uuid='{SECRET}'/></auth>");
    let pool = stage.pool("smb", &format!("<dir path='images/a'/><format type='cifs'/>{auth}")).await;
    let refused = pool.run("Start", options([])).await.expect_err("the secret has no value");
    assert!(refused.0.ends_with("SecretMissing"), "{refused:?}");
    let value = (PASSWORD.as_bytes(), options([]));
    stage.client.call(secret.as_str(), "org.virt.Secret.SetValue", &value).await.expect("set");
    let refused = pool.run("Start", options([])).await.expect_err("the server refuses it");
    assert!(refused.1.contains("mount.cifs: mount: access denied by server"), "{refused:?}");
    let told = stage.told();
    assert_eq!(told[1], "//nas.example.com/images/a");
    assert!(told[4].starts_with("nosuid,nodev,noexec,nobrl,credentials=/proc/self/fd/"), "{told:?}");
    assert!(!told.join(" ").contains(PASSWORD) && !stage.daemon.log().contains(PASSWORD));
    let credentials = fs::read_to_string(stage.tools.join("credentials")).expect("they were there to be read");
    assert_eq!(credentials, format!("username=virt\npassword={PASSWORD}\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_never_answers_costs_its_pool_alone_and_is_waited_for_until_that_is_cancelled() {
    let Some(stage) = Stage::new().await else { return };
    let pool = stage.pool("nas", "<dir path='/export'/>").await;
    fs::write(stage.tools.join("hangs"), "").expect("written");
    let reply = pool.run("Start", options([("no-wait", true.into())])).await.expect("begun");
    let job: OwnedObjectPath = reply.body().deserialize().expect("o");
    let begun = stage.tools.join("begun");
    until(&stage.tools, || begun.exists()).await;
    assert_eq!(pool.get::<String>("State").await, "starting");
    Pool::started(&stage.daemon, &stage.client, "beside").await;
    let mut watch = stage.client.watch().await;
    stage.client.call(job.as_str(), "org.virt.Job.Cancel", &()).await.expect("cancelled");
    while pool.get::<String>("State").await == "starting" {
        watch.next().await;
    }
    assert_eq!(pool.get::<String>("State").await, "inactive");
    let tool = fs::read_to_string(&begun).expect("its number");
    assert!(!Path::new("/proc").join(tool.trim()).join("exe").exists(), "the tool is killed");
    assert!(!Path::new(&format!("/proc/{}/root{}", stage.daemon.virtd_pid(), stage.aside().display())).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_offers_is_asked_of_the_one_that_is_named() {
    let Some(stage) = Stage::new().await else { return };
    let found = stage.find("<source><host name='nas.example.com'/></source>").await.expect("asked");
    for dir in ["/export/images", "/export/media"] {
        assert!(found.contains(&format!("<dir path='{dir}'/>")), "{found}");
    }
    assert_eq!(found.matches("<dir ").count(), 2, "no name with a control character: {found}");
    assert!(found.contains("<host name='nas.example.com'/>") && found.contains("<format type='nfs'/>"), "{found}");
    for (xml, wanted) in [
        ("", "InvalidArgument"),
        ("<source/>", "InvalidArgument"),
        ("<source><host name='-x'/></source>", "InvalidArgument"),
        ("<source><hosts/></source>", "ConfigInvalid"),
        ("<pool/>", "ConfigInvalid"),
        ("<source><host name='other'/></source>", "StorageFailed"),
        ("<source><host name='nas.example.com'/><format type='cifs'/></source>", "ConfigInvalid"),
        ("<source><host name='nas.example.com' port='2049'/></source>", "ConfigInvalid"),
        ("<source><host name='nas.example.com'/><host name='b'/></source>", "ConfigInvalid"),
    ] {
        let refused = stage.find(xml).await.expect_err(xml);
        assert!(refused.0.ends_with(wanted), "{xml}: {refused:?}");
    }
}
