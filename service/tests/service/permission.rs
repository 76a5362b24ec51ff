//! Who may do what, what a user may have, and what `Can` says of both.

use crate::world::{World, with_snapshot, xml};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use virt_drivers::test::Asked;
use virt_model::domain::Form;
use virt_model::driver::GivenFile;
use virt_service::authz::{Action, Caller};
use virt_service::error::Error;
use virt_service::{CreateOptions, SaveOptions, StartOptions, UndefineOptions, verb};

#[tokio::test]
async fn nothing_changes_without_permission_and_the_subject_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    world.told();
    world.notary.refuses.store(true, Ordering::Relaxed);
    let alice = world.alice();
    assert!(matches!(world.start(&domain).await, Err(Error::AccessDenied(_))));
    assert!(matches!(domain.destroy(&alice, false).await, Err(Error::AccessDenied(_))));
    assert!(matches!(domain.rename(&alice, "x").await, Err(Error::AccessDenied(_))));
    assert!(matches!(domain.set_autostart(&alice, true).await, Err(Error::AccessDenied(_))));
    assert!(matches!(domain.xml(&alice, Form::default()).await, Err(Error::AccessDenied(_))));
    assert!(matches!(domain.undefine(&alice, UndefineOptions::default()).await, Err(Error::AccessDenied(_))));
    assert_eq!(world.told(), Vec::<String>::new());
    let asked = world.notary.asked.lock().unwrap();
    let (_, first) = asked.first().unwrap();
    assert_eq!((first.owner, first.detail("domain_name")), (None, "web"), "to define what is nobody's yet");
    assert!(asked[1..].iter().all(|(_, subject)| subject.owner == Some(1000) && subject.detail("driver") == "test"));
}

#[tokio::test]
async fn a_job_of_another_user_is_cancelled_or_finished_with_permission_only() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    world.driver.hang_start(domain.uuid());
    let ticket = domain.start(&world.alice(), StartOptions::default()).await.unwrap();
    let bob = Caller { uid: 1001, ..world.alice() };
    world.notary.refuses.store(true, Ordering::Relaxed);
    assert!(matches!(world.service.cancel_job(&bob, ticket.id).await, Err(Error::AccessDenied(_))));
    assert_eq!(world.notary.asked.lock().unwrap().last().unwrap().0, Action::Job);
    assert!(matches!(world.service.finish_job(&bob, ticket.id, false).await, Err(Error::AccessDenied(_))));
    let early = world.service.finish_job(&world.alice(), ticket.id, false).await;
    assert!(matches!(early, Err(Error::OperationInvalid(_))), "its own needs none, but a start is never ready");
    world.service.cancel_job(&world.alice(), ticket.id).await.expect("one's own needs none");
}

#[tokio::test]
async fn permission_to_define_what_is_nobodys_is_none_to_change_what_is_somebodys() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let document = xml("web", &format!("<uuid>{}</uuid>", uuid::Uuid::new_v4()));
    let answer = Arc::new(tokio::sync::Notify::new());
    *world.notary.thinks.lock().unwrap() = Some(answer.clone());
    let alice = world.alice();
    let bob = Caller { uid: 1001, ..world.alice() };
    let slow = world.service.define(&alice, &document, false);
    let quick = async {
        // Not before alice's question is being thought about: documents are read on other threads, in any order.
        while world.notary.thinks.lock().unwrap().is_some() {
            tokio::task::yield_now().await;
        }
        world.service.define(&bob, &document, false).await.expect("bob is first");
        answer.notify_one();
    };
    let error = tokio::join!(slow, quick).0.map(|_| ()).expect_err("what was allowed was another domain");
    assert!(matches!(&error, Error::DomainExists(text) if text.contains("meanwhile; try again")), "{error}");
    let owners: Vec<_> = world.notary.asked.lock().unwrap().iter().map(|(_, subject)| subject.owner).collect();
    assert_eq!(owners, [None, None]);
}

#[tokio::test]
async fn can_tells_without_asking_a_person() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    let caller = Caller { interactive: true, ..world.alice() };
    let can = |method: &'static str| domain.can(&caller, method);
    assert_eq!(can("Start").await.unwrap(), "yes");
    assert_eq!(can("Destroy").await.unwrap(), "na");
    world.notary.refuses.store(true, Ordering::Relaxed);
    assert_eq!(can("Start").await.unwrap(), "no");
    assert!(matches!(can("Fly").await, Err(Error::InvalidArgument(_))));
}

#[tokio::test]
async fn can_knows_methods_of_snapshots_and_of_the_service() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = with_snapshot(&world, "web").await;
    assert_eq!(domain.can_with_snapshot(&world.alice(), "on", "Revert").await.unwrap(), "yes");
    assert!(matches!(
        domain.can_with_snapshot(&world.alice(), "other", "Revert").await,
        Err(Error::NoSuchSnapshot { .. })
    ));
    assert_eq!(world.service.can(&world.alice(), "DefineDomain").await.unwrap(), "yes");
    world.notary.only_reads.store(true, Ordering::Relaxed);
    assert_eq!(domain.can_with_snapshot(&world.alice(), "on", "Delete").await.unwrap(), "no");
    assert_eq!(domain.can_with_snapshot(&world.alice(), "on", "CheckDelete").await.unwrap(), "yes");
    assert_eq!(world.service.can(&world.alice(), "CreateDomain").await.unwrap(), "no");
    assert_eq!(world.service.can(&world.alice(), "ListDomains").await.unwrap(), "yes");
    assert!(matches!(world.service.can(&world.alice(), "Revert").await, Err(Error::InvalidArgument(_))));
}

#[tokio::test]
async fn a_question_to_the_hypervisor_runs_in_the_frame_of_all_verbs() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    let (verb, ask) = verb::ASKS.iter().find(|(verb, _)| **verb == verb::INJECT_NMI).unwrap();
    assert_eq!(domain.can(&world.alice(), verb.member).await.unwrap(), "na");
    let refused = domain.ask(&world.alice(), verb, *ask).await.unwrap_err();
    assert!(matches!(refused, Error::OperationInvalid(_)), "{refused}");
    domain.start(&world.alice(), StartOptions::default()).await.unwrap().done().await.unwrap();
    domain.ask(&world.alice(), verb, *ask).await.unwrap();
    assert_eq!(world.driver.guest(domain.uuid()).unwrap().asked(), Some(Asked::Interrupted));
    world.notary.refuses.store(true, Ordering::Relaxed);
    assert!(matches!(domain.ask(&world.alice(), verb, *ask).await, Err(Error::AccessDenied(_))));
}

/// An agent that is asked is busy: that is for those who may take the snapshot. The test driver has none, so it tells who asks.
#[tokio::test]
async fn a_check_asks_the_agent_only_for_those_who_may_freeze_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = with_snapshot(&world, "web").await;
    let options = || CreateOptions { disk_only: true, quiesce: true, ..CreateOptions::default() };
    let check = async || domain.check_create_snapshot(&world.alice(), "<domainsnapshot/>", options()).await.unwrap();
    assert!(matches!(check().await, Err(Error::AgentUnavailable(_))), "who may, has it asked");
    world.notary.only_reads.store(true, Ordering::Relaxed);
    check().await.expect("a stranger learns what would be done, as far as the agent need not be asked");
    domain.suspend(&world.alice()).await.unwrap();
    assert!(matches!(check().await, Err(Error::AgentUnavailable(_))), "that it stands can be told without asking");
}

/// In a shared folder a snapshot's files could take the names that another machine's images are to have.
#[tokio::test]
async fn m8_files_that_are_not_called_after_ones_own_images_need_permission_to_define() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let with_disk = |name: &str, image: &str| {
        let disk = format!(
            "<devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/pool/{image}'/>\
             <target dev='vda' bus='virtio'/></disk></devices>"
        );
        xml(name, &disk)
    };
    let web = world.service.define(&world.alice(), &with_disk("web", "web.qcow2"), false).await.expect("defined");
    world.service.define(&world.alice(), &with_disk("shop", "web.golden"), false).await.expect("defined");
    for (name, file, needs) in [
        ("one", "", false),
        ("two", "/pool/web.two", false),
        // By its default name, which is another's.
        ("golden", "", true),
        ("three", "/pool/web.three.overlay", false),
        ("four", "/pool/shop.qcow2", true),
        ("five", "/pool/web.other", true),
        ("six", "/elsewhere/web.six", true),
        ("seven", "/pool/web.seven/../web.seven", true),
    ] {
        let source = if file.is_empty() { String::new() } else { format!("<source file='{file}'/>") };
        let doc = format!(
            "<domainsnapshot><name>{name}</name><disks><disk name='vda' snapshot='external'>{source}</disk></disks>\
             </domainsnapshot>"
        );
        world.notary.asked.lock().unwrap().clear();
        let options = CreateOptions { disk_only: true, ..CreateOptions::default() };
        if let Ok((_, ticket)) = web.create_snapshot(&world.alice(), &doc, options).await {
            let _ = ticket.done().await;
        }
        let asked: Vec<Action> = world.notary.asked.lock().unwrap().iter().map(|(action, _)| *action).collect();
        assert_eq!(asked.contains(&Action::Define), needs, "{name}: {asked:?}");
    }
}

#[tokio::test]
async fn a_machine_is_saved_by_descriptor_by_who_may_read_its_secrets_and_by_path_by_who_may_define() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let web = world.define("web").await;
    let (_ear, mouth) = std::io::pipe().unwrap();
    let given = Some(Arc::new(GivenFile::new(mouth.into(), drop)));
    for (file, given, right) in [("", given, Action::ReadSecure), ("/pool/web.save", None, Action::Define)] {
        world.notary.asked.lock().unwrap().clear();
        let options = SaveOptions { given, ..SaveOptions::default() };
        web.save(&world.alice(), file, options).await.expect_err("it is off");
        let asked: Vec<Action> = world.notary.asked.lock().unwrap().iter().map(|(action, _)| *action).collect();
        assert_eq!(asked, [Action::Save, right]);
    }
}

#[tokio::test]
async fn what_a_user_may_have_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    for name in ["a", "b", "c"] {
        world.define(name).await;
    }
    let fourth = world.service.define(&world.alice(), &xml("d", ""), false).await;
    assert!(matches!(fourth, Err(Error::LimitsExceeded(_))));
    let first = world.service.by_name("a").unwrap();
    first.undefine(&world.alice(), UndefineOptions::default()).await.unwrap();
    world.define("d").await;
}
