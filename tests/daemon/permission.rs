//! Who may do what to whom's machine: people on a system bus, the example rules, a real polkitd, a person at a prompt.

use crate::common::client::{Client, Domain, options};
use crate::common::users::{ADMIN, ALICE, BOB, OPERATOR, User};
use crate::common::{Daemon, Setup, have};
use zbus::Variant;

const TOY: &str = "<domain type='test'><name>web</name><memory>65536</memory><os><type>hvm</type></os></domain>";
const NEEDS_PASSWORD: &str = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired";

async fn client(daemon: &Daemon, user: &User) -> Client {
    Client { connection: daemon.connect_as(user).await }
}

/// A virtd with the example rules, and a machine that `ADMIN` defined and so owns.
async fn with_machine() -> Option<(Daemon, Domain)> {
    let daemon = Daemon::on_system_bus(Setup::with_example_rules()).await?;
    let domain = client(&daemon, &ADMIN).await.define(TOY).await.expect("virt-admin may define");
    Some((daemon, domain))
}

/// The machine as `user` sees it.
async fn seen_by(daemon: &Daemon, user: &User, domain: &Domain) -> Domain {
    Domain { client: client(daemon, user).await, path: domain.path.clone() }
}

#[tokio::test]
async fn the_owner_starts_and_stops_and_the_stranger_looks_on() {
    let Some((daemon, mine)) = with_machine().await else { return };
    assert_eq!(mine.property::<u32>("Owner").await, ADMIN.uid);
    mine.run("Start").await.expect("the owner starts");

    let theirs = seen_by(&daemon, &BOB, &mine).await;
    assert_eq!(theirs.state().await, ("running".into(), "booted".into()));
    assert!(theirs.xml().await.contains("<name>web</name>"), "reading is free");
    for (method, action) in [("Destroy", "stop"), ("Undefine", "delete"), ("Shutdown", "stop")] {
        let (name, text) = theirs.run(method).await.expect_err(method);
        assert_eq!(name, NEEDS_PASSWORD, "{method}: {text}");
        assert!(text.contains(&format!("org.virt.domain.{action}")), "{method}: {text}");
    }
    let (name, _) = theirs.bare("Suspend").await.expect_err("Suspend");
    assert_eq!(name, NEEDS_PASSWORD);
    assert_eq!(mine.state().await.0, "running", "nothing happened");

    mine.run("Destroy").await.expect("the owner stops");
    mine.run("Undefine").await.expect("and removes");
}

#[tokio::test]
async fn group_virt_starts_what_it_may_not_change() {
    let Some((daemon, domain)) = with_machine().await else { return };
    let operated = seen_by(&daemon, &OPERATOR, &domain).await;
    operated.run("Start").await.expect("group virt starts");
    operated.bare("Suspend").await.expect("and suspends");
    operated.run("Destroy").await.expect("and stops");
    assert_eq!(operated.run("Undefine").await.expect_err("but does not remove").0, NEEDS_PASSWORD);
    let renamed = operated.call("Rename", &("other", options([]))).await;
    assert_eq!(renamed.expect_err("nor rename").0, NEEDS_PASSWORD);
}

#[tokio::test]
async fn to_define_is_for_those_who_may_be_root() {
    let Some(daemon) = Daemon::on_system_bus(Setup::with_example_rules()).await else { return };
    for user in [ALICE, OPERATOR] {
        let Err((name, text)) = client(&daemon, &user).await.define(TOY).await else { panic!("{}", user.name) };
        assert_eq!(name, NEEDS_PASSWORD);
        assert!(text.contains("org.virt.domain.define"), "{text}");
    }
    let root = Client { connection: daemon.connect().await };
    let domain = root.define(TOY).await.expect("root may");
    let theirs = seen_by(&daemon, &ALICE, &domain).await;
    assert_eq!(theirs.run("Start").await.expect_err("not hers").0, NEEDS_PASSWORD);
}

#[tokio::test]
async fn setting_a_property_is_a_change_like_any_other() {
    let Some((daemon, domain)) = with_machine().await else { return };
    let set = async |user: &User| {
        let body = ("org.virt.Domain", "Autostart", Variant::from(true));
        client(&daemon, user).await.call(&domain.path, "org.freedesktop.DBus.Properties.Set", &body).await
    };
    assert_eq!(set(&BOB).await.expect_err("a stranger").0, NEEDS_PASSWORD);
    assert!(!domain.property::<bool>("Autostart").await);
    set(&ADMIN).await.expect("virt-admin");
    assert!(domain.property::<bool>("Autostart").await);
}

#[tokio::test]
async fn a_program_can_ask_first_without_prompting() {
    let Some((daemon, mine)) = with_machine().await else { return };
    let theirs = seen_by(&daemon, &BOB, &mine).await;
    let can = async |domain: &Domain, method: &str| {
        domain.call("Can", &(method,)).await.expect(method).body().deserialize::<String>().expect("a word")
    };
    assert_eq!(can(&mine, "Start").await, "yes");
    assert_eq!(can(&theirs, "Start").await, "challenge");
    assert_eq!(can(&theirs, "GetXML").await, "yes");
    assert_eq!(can(&mine, "Resume").await, "na");
}

/// Somebody at a terminal: bob's busctl, with an agent that asks for the password of the administrator, alice.
/// The agent serves the process that calls, so the shell that starts it becomes busctl.
const WITH_AGENT: &str = r#"
set timeout 30
set call [lindex $argv 0]
spawn bash -c "exec 8< <(pkttyagent --process \$\$ --notify-fd 1); read -u 8; exec busctl --system call $call"
expect {Authentication is required to start the virtual machine "web"} {} timeout {exit 9} eof {exit 8}
expect {Password:} {} timeout {exit 7}
# What is typed before the agent has turned off the echo is thrown away.
while {![string match {* -echo *} [exec stty -a -F $spawn_out(slave,name)]]} {after 20}
send "[lindex $argv 1]\r"
expect eof
catch wait result
exit [lindex $result 3]
"#;

#[tokio::test(flavor = "multi_thread")]
async fn the_prompt_names_machine_and_deed_and_a_password_opens_the_door() {
    if !have(&["expect", "busctl", "pkttyagent"]) {
        return;
    }
    let alice_is_admin = "polkit.addAdminRule(function () { return ['unix-user:virt-alice']; });";
    let setup = Setup { rules: alice_is_admin.to_owned(), ..Setup::default() };
    let Some(daemon) = Daemon::on_system_bus(setup).await else { return };
    let root = Client { connection: daemon.connect().await };
    let domain = root.define(TOY).await.expect("root defines");
    let script = daemon.folder().join("prompt.exp");
    std::fs::write(&script, WITH_AGENT).expect("written");
    let call = format!("org.virt {} org.virt.Domain Start a{{sv}} 0", domain.path);
    let answer = |password: &str| {
        let mut expect = daemon.as_user(&BOB, "expect");
        let output = expect.arg("-f").arg(&script).args([call.as_str(), password]).output().expect("expect runs");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (status, said) = tokio::task::block_in_place(|| answer("no idea"));
    assert_eq!(status, Some(1), "{said}");
    assert_eq!(domain.state().await.0, "shutoff");
    let (status, said) = tokio::task::block_in_place(|| answer("secret"));
    assert_eq!(status, Some(0), "{said}");
    assert_eq!(domain.state().await.0, "running");
}

#[tokio::test]
async fn without_an_agent_there_is_nobody_to_ask() {
    let Some((daemon, domain)) = with_machine().await else { return };
    let call = ["call", "org.virt", &domain.path, "org.virt.Domain", "Start", "a{sv}", "0"];
    let may = daemon.busctl(&BOB, &call).expect_err("bob has no agent");
    assert!(may.contains("org.virt.domain.start") && may.contains("no authentication agent"), "{may}");
    let may_not = daemon.busctl(&BOB, &[&["--allow-interactive-authorization=no"], &call[..]].concat());
    assert!(may_not.expect_err("nor may be asked").contains("the call does not allow that"));
}

#[tokio::test]
async fn without_polkitd_only_root_may() {
    let Some((daemon, domain)) = with_machine().await else { return };
    daemon.kill_polkitd();
    let (name, text) = domain.run("Start").await.expect_err("nobody to ask");
    assert_eq!(name, "org.freedesktop.DBus.Error.AccessDenied", "{text}");
    assert!(text.contains("polkit could not be asked"), "{text}");
    let root = Domain { client: Client { connection: daemon.connect().await }, path: domain.path.clone() };
    root.run("Start").await.expect("root is not asked about");
}

/// M5.
#[tokio::test]
async fn a_stranger_does_not_learn_which_files_there_are() {
    let Some(daemon) = Daemon::on_system_bus(Setup::with_example_rules()).await else { return };
    let disk = "<devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
                <source file='/images/web.qcow2'/><target dev='vda' bus='virtio'/></disk></devices></domain>";
    let xml = TOY.replace("</domain>", disk);
    let domain = client(&daemon, &ADMIN).await.define(&xml).await.expect("virt-admin may define");
    let theirs = seen_by(&daemon, &BOB, &domain).await;
    for file in ["/etc/shadow", "/etc/no-such-file"] {
        let snapshot = format!(
            "<domainsnapshot><disks><disk name='vda' snapshot='external'><source file='{file}'/></disk></disks>\
             </domainsnapshot>"
        );
        let body = (snapshot.as_str(), options([("disk-only", Variant::from(true))]));
        let (name, text) = theirs.call("CheckCreateSnapshot", &body).await.expect_err("not for him");
        assert_eq!(name, NEEDS_PASSWORD, "{file}: {text}");
        assert!(text.contains("org.virt.domain.define"), "{file}: {text}");
    }
}
