//! Domain documents as the tools write them: read, completed, written, and compared as text with what is expected.
//!
//! `tests/data/domain/<case>.xml` is what is read, `<case>.out.xml` what is written: stored (`defaults` filled in), with
//! secrets. With `UPDATE=1` in the environment the expectations are written anew, to be reviewed.

use std::path::PathBuf;
use virt_model::domain::{DomainDef, Form};

const FULL: Form = Form { inactive: false, secure: true, migratable: false };
const STORED: Form = Form { inactive: true, secure: true, migratable: false };

fn data() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/domain")
}

fn read(name: &str) -> String {
    std::fs::read_to_string(data().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn parse(text: &str) -> DomainDef {
    DomainDef::parse(text).unwrap_or_else(|findings| {
        panic!("{}", findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    })
}

fn cases() -> Vec<String> {
    let files = std::fs::read_dir(data()).unwrap();
    let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
    let mut cases: Vec<_> =
        names.filter(|n| !n.contains(".out.")).filter_map(|n| Some(n.strip_suffix(".xml")?.to_owned())).collect();
    cases.sort();
    cases
}

#[test]
fn tools_documents_come_back_canonical() {
    for case in cases() {
        let mut def = parse(&read(&format!("{case}.xml")));
        def.fill_defaults();
        let written = def.write(STORED);
        let expected = data().join(format!("{case}.out.xml"));
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&expected, &written).unwrap();
        }
        assert_eq!(written, read(&format!("{case}.out.xml")), "{case}");
    }
}

#[test]
fn what_is_written_reads_back_equal() {
    for case in cases() {
        let mut def = parse(&read(&format!("{case}.xml")));
        assert!(parse(&def.write(FULL)) == def, "{case} as read");
        def.fill_defaults();
        let filled = parse(&def.write(FULL));
        assert!(filled == def, "{case} completed");
        assert_eq!(filled.write(FULL), def.write(FULL), "{case}");
        let mut again = filled.clone();
        again.fill_defaults();
        assert!(again == def, "{case}: completing is idempotent");
        assert!(def.same_configuration(&parse(&def.write(STORED))), "{case}: stored form is the same configuration");
    }
}
