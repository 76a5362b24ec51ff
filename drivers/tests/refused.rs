//! Documents that cannot be a machine, as text: `tests/data/refused/cross.txt` says what is wrong with each, and all that
//! is found. With `UPDATE=1` in the environment the findings are written anew, to be reviewed.

mod qemu;

use qemu::{caps, data};
use std::fmt::Write;
use virt_drivers::qemu::check::check;
use virt_drivers::qemu::complete::complete;
use virt_model::domain::DomainDef;
use virt_model::xml::add_findings;
use virt_model::xml::{Finding, FindingKind};

/// A document in the making.
#[derive(Default)]
struct Case {
    name: String,
    /// Where each line goes, and the line.
    lines: Vec<(String, String)>,
    expected: Vec<String>,
}

impl Case {
    fn read(block: &str) -> Case {
        let mut case = Case::default();
        for line in block.lines() {
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            match word {
                "case" => case.name = rest.to_owned(),
                "->" => case.expected.push(rest.to_owned()),
                _ => case.lines.push((word.to_owned(), rest.to_owned())),
            }
        }
        case
    }

    /// The lines for one place, each on a line of its own.
    fn of(&self, place: &str) -> String {
        self.lines.iter().filter(|(at, _)| at == place).fold(String::new(), |text, (_, line)| text + line + "\n")
    }

    fn one(&self, word: &str, default: &str) -> String {
        self.lines.iter().find(|(at, _)| at == word).map_or(default, |(_, line)| line).to_owned()
    }

    fn document(&self) -> String {
        let cpu = self.of("cpu");
        let cpu = if cpu.is_empty() { cpu } else { format!("<cpu>\n{cpu}</cpu>\n") };
        format!(
            "<domain type='{}'>\n<name>a</name>\n<memory unit='MiB'>64</memory>\n<vcpu>2</vcpu>\n{}\
             <os {}>\n<type arch='x86_64' machine='{}'>hvm</type>\n{}</os>\n\
             <features>\n<acpi/>\n{}</features>\n{cpu}<devices>\n{}</devices>\n</domain>\n",
            self.one("type", "kvm"),
            self.of("domain"),
            self.one("osattr", ""),
            self.one("machine", "q35"),
            self.of("os"),
            self.of("features"),
            self.of("devices"),
        )
    }
}

/// Everything that is found in a document, as `ValidateDomain` tells it.
fn found(document: &str) -> Vec<Finding> {
    let caps = caps();
    let (def, mut findings) = DomainDef::parse_leniently(document);
    let mut def = def.expect("a document that can be read");
    if let Err(later) = complete(&mut def, &caps) {
        add_findings(&mut findings, later);
    }
    add_findings(&mut findings, check(&def, &caps));
    findings
}

fn show(finding: &Finding) -> String {
    let weight = match finding.kind {
        FindingKind::Invalid => "not defined",
        FindingKind::Unsupported => "no start",
        FindingKind::Warning => "warning",
    };
    format!("{weight}, line {}: {}: {}", finding.line, finding.path, finding.message)
}

#[test]
fn what_cannot_be_is_refused_with_its_place_and_a_remedy() {
    let file = data().join("../refused/cross.txt");
    let text = std::fs::read_to_string(&file).unwrap();
    let (head, blocks) = text.split_once("\n\n").unwrap();
    let cases: Vec<Case> = blocks.split("\n\n").map(Case::read).collect();
    let mut written = head.to_owned() + "\n";
    let mut silent = Vec::new();
    for case in &cases {
        _ = write!(written, "\ncase {}\n", case.name);
        case.lines.iter().for_each(|(place, line)| _ = writeln!(written, "{place} {line}"));
        let findings = found(&case.document());
        findings.iter().for_each(|finding| _ = writeln!(written, "-> {}", show(finding)));
        if findings.is_empty() || findings.iter().any(|finding| finding.line == 0) {
            silent.push(case.name.clone());
        }
    }
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&file, &written).unwrap();
    }
    assert!(silent.is_empty(), "nothing is said of: {silent:#?}");
    assert!(cases.len() >= 100, "only {} cases", cases.len());
    let kept = std::fs::read_to_string(&file).unwrap();
    let first = written.lines().zip(kept.lines()).find(|(now, then)| now != then);
    assert!(written == kept, "now and then: {first:#?}");
}

/// The machine that the cases are put into is a good one, so that what is found is found in them.
#[test]
fn without_them_nothing_is_found() {
    for machine in ["q35", "pc"] {
        let case = Case { lines: vec![("machine".to_owned(), machine.to_owned())], ..Case::default() };
        assert_eq!(found(&case.document()), [], "{machine}");
    }
}
