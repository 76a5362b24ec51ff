//! What is shipped beside the code, held to the code: polkit's actions, bus policy, what is installed.

use clap::CommandFactory as _;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use virt_service::authz::Action;
use virtd::bus::table::FILES;
use virtd::settings::{Arguments, Config};

fn project_file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(project_file(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Parses a file that has a DOCTYPE.
fn parse(text: &str) -> roxmltree::Document<'_> {
    let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
    roxmltree::Document::parse_with_options(text, options).unwrap()
}

/// The text of the only element `name` below `node`.
fn text<'a>(node: roxmltree::Node<'a, '_>, name: &str) -> &'a str {
    node.descendants().find(|child| child.has_tag_name(name)).and_then(|child| child.text()).unwrap_or_default()
}

#[test]
fn polkit_actions_are_those_of_the_service() {
    let file = read("polkit/org.virt.policy");
    let document = parse(&file);
    let found: Vec<_> = document.descendants().filter(|node| node.has_tag_name("action")).collect();
    let ids: Vec<_> = found.iter().map(|action| action.attribute("id").unwrap()).collect();
    assert_eq!(ids, Action::ALL.iter().map(|action| action.id()).collect::<Vec<_>>());
    for (node, action) in found.into_iter().zip(Action::ALL) {
        let (kind, deed) = (action.kind(), action.deed());
        let message = format!("Authentication is required to {deed} the {} \"$({})\"", kind.shown(), kind.detail());
        assert_eq!(text(node, "message"), message);
        let default = match action {
            Action::Read | Action::NetworkRead | Action::StorageRead | Action::SecretRead | Action::DeviceRead => "yes",
            Action::Start | Action::Suspend | Action::Console => "auth_admin_keep",
            Action::NetworkStart | Action::StorageStart => "auth_admin_keep",
            _ => "auth_admin",
        };
        for who in ["allow_any", "allow_inactive", "allow_active"] {
            assert_eq!(text(node, who), default, "{} {who}", action.id());
        }
    }
}

/// polkit 122 keeps only what follows the last entity of a text.
#[test]
fn polkit_texts_have_no_entities() {
    assert!(!read("polkit/org.virt.policy").contains('&'));
}

#[test]
fn example_rules_speak_of_actions_that_exist() {
    let rules = read("polkit/50-org.virt.example.rules");
    let lists = rules.lines().filter_map(|line| line.trim().strip_prefix("var verbs = [")?.strip_suffix("];"));
    let named: BTreeSet<_> = lists.flat_map(|list| list.split(", ")).map(|verb| verb.trim_matches('"')).collect();
    assert!(named.len() > 5, "{named:?}");
    for verb in named {
        let id = format!("org.virt.domain.{verb}");
        assert!(Action::ALL.iter().any(|action| action.id() == id), "{id}");
    }
}

/// The interfaces that each policy context of a bus configuration lets calls through to.
fn interfaces(file: &str) -> Vec<BTreeSet<String>> {
    let text = read(file);
    let document = parse(&text);
    let policies = document.descendants().filter(|node| node.has_tag_name("policy"));
    let sets = policies.map(|policy| {
        let allowed = policy.children().filter(|rule| rule.has_tag_name("allow"));
        allowed.filter_map(|rule| rule.attribute("send_interface")).map(str::to_owned).collect()
    });
    sets.filter(|set: &BTreeSet<String>| !set.is_empty()).collect()
}

#[test]
fn bus_policies_name_every_interface() {
    let mut expected: BTreeSet<String> = ["Properties", "ObjectManager", "Introspectable", "Peer"]
        .map(|name| format!("org.freedesktop.DBus.{name}"))
        .into();
    expected.insert("org.virt.Snapshot".to_owned());
    for entry in std::fs::read_dir(project_file("data/interfaces")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        expected.insert(name.trim_end_matches(".xml").to_owned());
    }
    for (file, contexts) in [("dbus-policy/org.virt.conf", 1), ("dbus-policy/org.virt-private.conf", 2)] {
        assert_eq!(interfaces(file), vec![expected.clone(); contexts], "{file}");
    }
}

/// Qt's D-Bus knows these types by itself.
const KNOWN_TO_QT: &[&str] = &["s", "o", "b", "u", "i", "t", "x", "d", "h", "v", "as", "ao", "ay"];

#[test]
fn every_compound_type_has_a_name_for_qt_that_the_header_declares() {
    const NAME: &str = "org.qtproject.QtDBus.QtTypeName";
    let header = read("data/virt-qtypes.h");
    let mut named = BTreeSet::new();
    for file in FILES {
        let document = parse(file);
        let interface = document.descendants().find(|node| node.has_tag_name("interface")).expect("an interface");
        let interface = interface.attribute("name").expect("its name");
        let mut expect = |member: roxmltree::Node<'_, '_>, key: &str, of: &str| {
            let found = member.children().find(|one| one.attribute("name") == Some(key));
            let name = found.and_then(|one| one.attribute("value"));
            assert_eq!(name.is_none(), KNOWN_TO_QT.contains(&of), "{interface} {member:?}: {key} for {of}");
            named.extend(name.map(|name| (name.to_owned(), of.to_owned())));
        };
        for member in
            document.descendants().filter(|node| ["method", "signal"].iter().any(|tag| node.has_tag_name(*tag)))
        {
            for (direction, word) in [("in", "In"), ("out", "Out")] {
                let args = member.children().filter(|node| node.has_tag_name("arg"));
                let these = args.filter(|arg| arg.attribute("direction").unwrap_or("out") == direction);
                for (at, arg) in these.enumerate() {
                    expect(member, &format!("{NAME}.{word}{at}"), arg.attribute("type").unwrap());
                }
            }
        }
        for property in document.descendants().filter(|node| node.has_tag_name("property")) {
            expect(property, NAME, property.attribute("type").unwrap());
        }
    }
    assert!(named.len() > 4, "{named:?}");
    for (name, of) in named {
        let how = match &*of {
            of if of.starts_with('(') => format!("struct {name} {{"),
            of if of.starts_with("a{s") => format!("using {name} = QMap<"),
            _ => format!("using {name} = QList<"),
        };
        let declared = header.contains(&how);
        assert_eq!(declared, of != "a{sv}", "{name} for {of}");
        assert!(declared || name == "QVariantMap", "{name}");
    }
}

/// The methods that say in their files that their options may give descriptors.
fn takes_descriptors() -> BTreeSet<(String, String)> {
    let files = FILES.iter().map(|file| parse(file));
    let methods = files.flat_map(|document| {
        let methods = document.descendants().filter(|node| node.has_tag_name("method"));
        let takes = methods.filter(|method| {
            let annotated =
                |node: &roxmltree::Node<'_, '_>| node.attribute("name") == Some("org.virt.TakesDescriptors");
            method.children().any(|node| annotated(&node))
        });
        let named = |node: roxmltree::Node<'_, '_>| node.attribute("name").unwrap().to_owned();
        takes.map(|method| (named(method.parent().unwrap()), named(method))).collect::<Vec<_>>()
    });
    methods.collect()
}

/// Of two rules the later one counts: what lets an interface through must not let descriptors through, but for the methods that
/// take some.
#[test]
fn bus_policies_let_descriptors_through_to_those_who_take_them_and_to_no_others() {
    let takes = takes_descriptors();
    for (file, contexts) in [("dbus-policy/org.virt.conf", 1), ("dbus-policy/org.virt-private.conf", 2)] {
        let text = read(file);
        let document = parse(&text);
        let policies = document.descendants().filter(|node| node.has_tag_name("policy"));
        let sends = policies.filter(|policy| policy.children().any(|rule| rule.has_attribute("send_interface")));
        let sends: Vec<_> = sends.collect();
        assert_eq!(sends.len(), contexts, "{file}");
        for policy in sends {
            let rules: Vec<_> = policy.children().filter(|node| node.is_element()).collect();
            let denial = rules.iter().position(|rule| {
                let says = (rule.attribute("send_destination"), rule.attribute("min_fds"));
                rule.has_tag_name("deny") && says == (Some("org.virt"), Some("1"))
            });
            let behind = &rules[denial.expect("descriptors are denied") + 1..];
            let let_through = behind.iter().map(|rule| {
                assert!(rule.has_tag_name("allow"), "{file}: {rule:?}");
                let says = |name: &str| rule.attribute(name).unwrap_or_default().to_owned();
                (says("send_interface"), says("send_member"))
            });
            assert_eq!(let_through.collect::<BTreeSet<_>>(), takes, "{file}");
        }
    }
}

/// A rule without a destination would open other services on the bus.
#[test]
fn bus_policies_never_speak_of_other_services() {
    for file in ["dbus-policy/org.virt.conf", "dbus-policy/org.virt-private.conf"] {
        let text = read(file);
        for rule in parse(&text).descendants().filter(|node| node.has_tag_name("allow") || node.has_tag_name("deny")) {
            let about = ["own", "send_destination", "receive_sender"].iter().find_map(|key| rule.attribute(*key));
            assert_eq!(about, Some("org.virt"), "{file}: {rule:?}");
        }
    }
}

#[test]
fn the_example_configuration_shows_the_defaults() {
    let shown = Config::read(&project_file("data/virtd.toml")).unwrap();
    assert_eq!(shown, Config::default());
    let keys = read("data/virtd.toml").lines().filter(|line| line.contains(" = ")).count();
    assert_eq!(keys, 16, "a key is missing, or this number is old");
}

#[test]
fn the_man_page_knows_every_option() {
    let page = read("data/virtd.8");
    for option in Arguments::command().get_arguments().filter_map(|argument| argument.get_long()) {
        assert!(page.contains(&format!("\\-\\-{}", option.replace('-', "\\-"))), "--{option}");
    }
    assert!(page.contains(&format!("\"virtd {}\"", env!("CARGO_PKG_VERSION"))), "its version");
    for (target, id) in virtd::log::MESSAGE_IDS {
        assert!(page.contains(&format!("MESSAGE_ID={id}\n")), "{target}");
    }
    for action in Action::ALL {
        let (kind, verb) = action.id().rsplit_once('.').expect("a kind and a verb");
        assert!(page.contains(&verb.replace('-', "\\-")), "{verb}");
        assert!(page.contains(kind), "{kind}");
    }
}

#[test]
fn the_page_on_the_interface_names_every_error_and_shows_a_machine_that_is_accepted() {
    let page = read("data/org.virt.5");
    assert!(page.contains(&format!("\"virtd {}\"", env!("CARGO_PKG_VERSION"))), "its version");
    let names = read("interfaces/error.rs");
    let names: Vec<&str> = names.split("\"org.virt.Error.").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert!(names.len() > 15, "{names:?}");
    for name in names {
        assert!(page.split(|letter: char| !letter.is_alphanumeric()).any(|word| word == name), "{name}");
    }
    let end = page.find("</domain>").expect("a machine") + "</domain>".len();
    let machine = &page[page.find("<domain type=").expect("a machine")..end];
    let machine = machine.replace("$PWD", "/srv").replace("\\-", "-");
    virt_model::domain::DomainDef::parse(&machine).expect("accepted");
}

/// A machine that `tests/setup` is to get ready, as [`tests/fake-apt`] plays it: what it says, what is then installed, and
/// how apt was called.
struct Fake {
    folder: tempfile::TempDir,
}

impl Fake {
    fn with(installed: &[(&str, &str)], marks: &[&str]) -> Fake {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(folder.path().join("installed")).expect("a folder");
        for name in ["apt-get", "dpkg-query"] {
            std::os::unix::fs::symlink(project_file("tests/fake-apt"), folder.path().join(name)).expect("a link");
        }
        for (package, version) in installed {
            std::fs::write(folder.path().join("installed").join(package), version).expect("written");
        }
        marks.iter().for_each(|mark| std::fs::write(folder.path().join(mark), "").expect("written"));
        Fake { folder }
    }

    fn setup(&self) -> std::process::Output {
        let path = format!("{}:{}", self.folder.path().display(), std::env::var("PATH").unwrap_or_default());
        let mut command = std::process::Command::new(project_file("tests/setup"));
        command.arg("demo").env("PATH", path).env("FAKE", self.folder.path()).output().expect("bash")
    }

    fn version(&self, package: &str) -> Option<String> {
        std::fs::read_to_string(self.folder.path().join("installed").join(package))
            .ok()
            .map(|text| text.trim().to_owned())
    }

    fn calls(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("calls")).unwrap_or_default()
    }
}

const BACKPORT: (&str, &str) = ("qemu-utils", "1:10.0.2+ds-2~bpo12+1");

#[test]
fn n1_a_bare_machine_gets_all_in_one_call() {
    let fake = Fake::with(&[], &[]);
    let done = fake.setup();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    for package in ["qemu-system-x86", "qemu-utils", "polkitd", "gcc"] {
        assert!(fake.version(package).is_some(), "{package}");
    }
    let calls = fake.calls();
    let installs = calls.lines().filter(|call| call.contains("install") && !call.contains("--simulate"));
    assert_eq!(installs.count(), 1, "{calls}");
    assert!(calls.lines().filter(|call| call.contains("--yes")).all(|call| call.contains("--no-remove")), "{calls}");
}

#[test]
fn n1_a_machine_that_has_all_is_left_alone() {
    let fake = Fake::with(&[], &[]);
    assert!(fake.setup().status.success());
    let before = fake.calls();
    assert!(fake.setup().status.success());
    assert_eq!(fake.calls(), before);
}

#[test]
fn n1_newer_tools_from_backports_are_joined_and_not_removed() {
    let fake = Fake::with(&[BACKPORT], &["backports"]);
    let done = fake.setup();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(fake.version("qemu-utils").as_deref(), Some(BACKPORT.1), "what stood there stays");
    assert!(fake.version("qemu-system-x86").is_some());
    assert!(String::from_utf8_lossy(&done.stdout).contains("backports"), "and it is said");
}

#[test]
fn n1_newer_tools_without_their_archive_are_put_back_and_that_is_said() {
    let fake = Fake::with(&[BACKPORT], &[]);
    let done = fake.setup();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(fake.version("qemu-utils").as_deref(), Some("7.2"));
    assert!(fake.version("qemu-system-x86").is_some());
    let told = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(told.contains(BACKPORT.1) && told.contains("put back: qemu-utils/"), "{told}");
}

#[test]
fn n1_what_would_remove_something_is_not_done() {
    let fake = Fake::with(&[("qemu-utils", "7.2")], &["greedy"]);
    let done = fake.setup();
    assert!(!done.status.success());
    assert!(String::from_utf8_lossy(&done.stderr).contains("would remove what stands there: qemu-utils"));
    assert!(fake.version("qemu-utils").is_some() && fake.version("qemu-system-x86").is_none());
    assert!(!fake.calls().contains("--yes"), "{}", fake.calls());
}
