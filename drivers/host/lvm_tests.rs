use super::*;

fn group() -> GroupName {
    GroupName::new("vg0").unwrap()
}

fn volume(name: &str) -> LogicalName {
    LogicalName::new(name).unwrap()
}

#[test]
fn the_tool_is_told_what_is_changed_and_takes_no_name_for_an_option() {
    let (a, b) = (volume("a"), volume("b.img"));
    let devices = [PathBuf::from("/dev/sdb"), PathBuf::from("/dev/sdc1")];
    for (change, told) in [
        (Change::Activate, "vgchange --activate y -- vg0"),
        (Change::Deactivate, "vgchange --activate n -- vg0"),
        (Change::DeactivateVolume(&a), "lvchange --activate n -- vg0/a"),
        (Change::MakeGroup(&devices), "vgcreate --yes -- vg0 /dev/sdb /dev/sdc1"),
        (Change::RemoveGroup, "vgremove -- vg0"),
        (Change::Release(&devices[0]), "pvremove -- /dev/sdb"),
        (
            Change::Make(&a, 512),
            "lvcreate --yes --addtag virt-unfinished --wipesignatures y --zero y --size 512b --name a -- vg0",
        ),
        (Change::Finish(&b), "lvchange --deltag virt-unfinished -- vg0/b.img"),
        (Change::Remove("A-b"), "lvremove --yes --select lv_uuid=A-b -- vg0"),
        (Change::Extend(&a, 1024), "lvextend --size 1024b -- vg0/a"),
        (Change::Reduce(&a, 512), "lvreduce --force --yes --size 512b -- vg0/a"),
        (Change::MarkGrown(&a, 512), "lvchange --addtag virt-grown-from-512 -- vg0/a"),
        (Change::MarkBlank(&a, 512), "lvchange --deltag virt-grown-from-512 -- vg0/a"),
    ] {
        assert_eq!(change.arguments(&group()).join(" "), told);
    }
    for name in ["", "-a", "--yes", ".", "..", "a b", "a/b", "a\n", "ä", &"a".repeat(126)] {
        assert!(GroupName::new(name).is_err() && LogicalName::new(name).is_err(), "{name:?}");
    }
    assert!(GroupName::new(&"a".repeat(63)).is_err());
    assert!(group().check_new(&volume(&"a".repeat(123))).is_ok());
    for long in ["a".repeat(124), format!("{}-", "a".repeat(122))] {
        let why = group().check_new(&volume(&long)).unwrap_err();
        assert!(why.contains("at most 126 bytes together"), "{why}");
    }
    for name in ["snapshot1", "pvmove0", "a_tdata", "a_rimage_0"] {
        let why = LogicalName::new(name).unwrap_err();
        assert!(why.contains("LVM has"), "{why}");
        GroupName::new(name).unwrap();
    }
}

#[test]
fn what_the_tool_tells_is_read() {
    let told = |kind: &str, rows: &str| format!("{{\"report\":[{{\"{kind}\":[{rows}]}}]}}");
    let groups = told(
        "vg",
        r#"{"vg_name":"vg0","vg_size":"62914560","vg_free":"4194304","vg_extent_size":"4194304","lv_count":"2"}"#,
    );
    let wanted = Group { name: "vg0".to_owned(), bytes: 62_914_560, free: 4_194_304, extent: 4_194_304, volumes: 2 };
    assert_eq!(read_groups(&groups).unwrap(), [wanted]);
    let volumes = told(
        "lv",
        r#"{"lv_name":"a","lv_uuid":"pheGoc-oeMO-3yHx-9TZj-Um6B-Fv8T-jk5fMn","lv_size":"8388608","lv_layout":"linear",
            "lv_active":"active","lv_tags":"mine,virt-grown-from-4194304","data_percent":"","origin":"","origin_size":""},
           {"lv_name":"t","lv_uuid":"0heGoc-oeMO-3yHx-9TZj-Um6B-Fv8T-jk5fMn","lv_size":"8388608","lv_layout":"thin,sparse",
            "lv_active":"","lv_tags":"virt-unfinished","data_percent":"25.00","origin":"a","origin_size":"8388608"},
           {"lv_name":"p","lv_uuid":"1heGoc-oeMO-3yHx-9TZj-Um6B-Fv8T-jk5fMn","lv_size":"8388608","lv_layout":"thin,pool",
            "lv_active":"active","lv_tags":"","data_percent":"25.00","origin":"","origin_size":""},
           {"lv_name":"s","lv_uuid":"3heGoc-oeMO-3yHx-9TZj-Um6B-Fv8T-jk5fMn","lv_size":"4194304","lv_layout":"linear",
            "lv_active":"active","lv_tags":"","data_percent":"10.00","origin":"a","origin_size":"8388608"},
           {"lv_name":"c","lv_uuid":"4heGoc-oeMO-3yHx-9TZj-Um6B-Fv8T-jk5fMn","lv_size":"4194304","lv_layout":"cache",
            "lv_active":"active","lv_tags":"","data_percent":"10.00","origin":"[c_corig]","origin_size":""},
           {"lv_name":"a b","lv_uuid":"5","lv_size":"4194304","lv_layout":"linear","lv_active":"","lv_tags":"",
            "data_percent":""},
           {"lv_name":"p_tdata","lv_uuid":"2","lv_size":"8388608","lv_layout":"linear","lv_active":"","lv_tags":"",
            "data_percent":""}"#,
    );
    let LogicalVolumes { volumes: all, unnameable } = read_volumes(&volumes).unwrap();
    assert_eq!(unnameable, 1);
    // As large as what it was made of, and not as what it keeps for itself.
    let origins: Vec<_> =
        all.iter().map(|one| (one.origin.as_ref().map_or("", LogicalName::as_str), one.bytes)).collect();
    assert_eq!(origins, [("", 8 << 20), ("a", 8 << 20), ("", 8 << 20), ("a", 8 << 20), ("", 4 << 20)]);
    let told: Vec<_> =
        all.iter().map(|one| (one.name.as_str(), one.taken, one.is_active, one.is_thin, one.is_pool)).collect();
    assert_eq!(
        told,
        [
            ("a", 8 << 20, true, false, false),
            ("t", 2 << 20, false, true, false),
            ("p", 8 << 20, true, false, true),
            ("s", 4 << 20, true, false, false),
            ("c", 4 << 20, true, false, false),
        ]
    );
    assert_eq!((all[0].grown_from, all[1].grown_from), (Some(4 << 20), None));
    assert_eq!(all.iter().map(|one| one.is_unfinished).collect::<Vec<_>>(), [false, true, false, false, false]);
    assert!(all[0].id() != all[1].id() && all[1].id().born == all[2].id().born && all[0].id().number > 0);
    let devices = r#"{"report":[{"pv":[{"pv_name":"/dev/sdb","vg_name":"vg0"},{"pv_name":"/dev/sdc","vg_name":""},
        {"pv_name":"[unknown]","vg_name":"vg0"}]}]}"#;
    let groups: Vec<_> = read_devices(devices).unwrap().into_iter().map(|one| one.group).collect();
    assert_eq!(groups, [Some("vg0".to_owned()), None]);
    for wrong in ["", "{}", r#"{"report":[{"vg":[{"vg_name":"a"}]}]}"#] {
        assert!(matches!(read_groups(wrong), Err(DriverError::Internal(_))), "{wrong}");
    }
    assert_eq!(read_groups(r#"{"report":[{"vg":[]}]}"#).unwrap(), []);
}

#[test]
fn why_the_tool_refused_is_told_in_its_own_words() {
    let why = refusal("lvcreate", "  Volume group \"vg0\" has insufficient free space (1 extents): 2 required.\n");
    assert!(matches!(&why, DriverError::NoSpace(text) if text.starts_with("lvm lvcreate: Volume group")), "{why:?}");
    let why = refusal("lvremove", "  Logical volume vg0/a in use.\n");
    assert!(
        matches!(&why, DriverError::Refused(text) if text == "lvm lvremove: Logical volume vg0/a in use."),
        "{why:?}"
    );
    let DriverError::Storage(why) =
        refusal("vgs", "  Volume group \"vg0\" not found\n  Cannot process volume group vg0\n")
    else {
        panic!("it is no other")
    };
    assert!(says_there_is_none(&why, &group()) && !says_there_is_none(&why, &GroupName::new("vg").unwrap()));
    assert!(matches!(refusal("vgs", "one\n two\n"), DriverError::Storage(text) if text == "lvm vgs: one two"));
}
