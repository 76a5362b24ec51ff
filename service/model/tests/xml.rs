//! What is not well-formed is refused, with its place; what is accepted, other parsers accept too.

use proptest::prelude::*;
use virt_model::xml::{Finding, Limits, read};

const MAX_SIZE: usize = Limits::ACCEPTED.size;
const MAX_DEPTH: usize = Limits::ACCEPTED.depth;
const MAX_PIECES: usize = Limits::ACCEPTED.pieces;
const MAX_ELEMENTS: usize = Limits::ACCEPTED.elements;

fn refusal(text: &str) -> Finding {
    match read(text, &[]) {
        Ok(_) => panic!("accepted: {text}"),
        Err(finding) => finding,
    }
}

/// What is wrong, where, and a word of the message.
const MALFORMED: &[(&str, u32, u32, &str)] = &[
    ("", 1, 1, "no element"),
    ("   \n", 2, 1, "no element"),
    ("<a/><b/>", 1, 5, "second root"),
    ("<a></a>\n<a></a>", 2, 1, "second root"),
    ("<a/>x", 1, 5, "outside the root"),
    ("x<a/>", 1, 1, "outside the root"),
    ("<a/>&amp;", 1, 5, "outside the root"),
    ("<a/><![CDATA[]]>", 1, 5, "outside the root"),
    ("<a>", 1, 4, "ends before </a>"),
    ("<a><b></a></b>", 1, 7, ""),
    ("</a>", 1, 1, ""),
    ("<a b='<'/>", 1, 4, "'<'"),
    ("<a b='&'/>", 1, 4, "&amp;"),
    ("<a b='&nbsp;'/>", 1, 4, "not defined"),
    ("<a b=1/>", 1, 4, "quotes"),
    ("<a b/>", 1, 4, "no value"),
    ("<a b='1' b='2'/>", 1, 10, "twice"),
    ("<a b='1'c='2'/>", 1, 9, "blank"),
    ("<a\n  b='1'\n  é$='2'/>", 3, 3, "not a name"),
    ("<1a/>", 1, 1, "not a name"),
    ("<a$b/>", 1, 1, "not a name"),
    ("<a:b:c/>", 1, 1, "not a name"),
    ("<:a/>", 1, 1, "not a name"),
    ("< a/>", 1, 1, ""),
    ("<a/ >", 1, 1, ""),
    ("<a>\u{1}</a>", 1, 4, "U+0001"),
    ("<a b='\u{fffe}'/>", 1, 1, "U+FFFE"),
    ("<a>&#1;</a>", 1, 4, "not a character"),
    ("<a>&#0;</a>", 1, 4, ""),
    ("<a>&#xd800;</a>", 1, 4, "not a character"),
    ("<a>&#+65;</a>", 1, 4, ""),
    ("<a>&foo;</a>", 1, 4, "not defined"),
    ("<a>a & b</a>", 1, 6, ""),
    ("<a>]]></a>", 1, 4, "]]>"),
    ("<a><!-- -- --></a>", 1, 4, ""),
    ("<a><!-- ---></a>", 1, 4, ""),
    ("<a><!-- </a>", 1, 4, ""),
    ("<a><![CDATA[</a>", 1, 4, ""),
    ("<!DOCTYPE a><a/>", 1, 1, "document type"),
    ("<!DOCTYPE a [<!ENTITY x 'xxxxxxxxxx'>]><a>&x;</a>", 1, 1, "document type"),
    (" <?xml version='1.0'?><a/>", 1, 2, "very first"),
    ("<a/><?xml version='1.0'?>", 1, 5, "very first"),
    ("<?xml?><a/>", 1, 1, ""),
    ("<?xml version='1.1'?><a/>", 1, 1, "1.0"),
    ("<?xml version='1.0' encoding='latin1'?><a/>", 1, 1, "UTF-8"),
    ("<?xml version='1.0' foo='1'?><a/>", 1, 1, "foo"),
    ("<?1?><a/>", 1, 1, ""),
    ("<a><?XML x?></a>", 1, 4, ""),
    ("<x:a/>", 1, 1, "not declared"),
    ("<a x:b='1'/>", 1, 1, "not declared"),
    ("<a xmlns:x=''/>", 1, 1, "nothing"),
    ("<a xmlns:xml='u'/>", 1, 1, "xml"),
    ("<a xmlns:xmlns='u'/>", 1, 1, "xmlns"),
    ("<a xmlns:p='u' xmlns:q='u' p:b='1' q:b='2'/>", 1, 1, "two prefixes"),
    ("<b><a xmlns:x='u'/><x:a/></b>", 1, 20, "not declared"),
];

#[test]
fn malformed_documents_are_refused_with_their_place() {
    for (text, line, column, word) in MALFORMED {
        let finding = refusal(text);
        assert_eq!((finding.line, finding.column), (*line, *column), "{text}: {finding}");
        assert!(finding.message.contains(word), "{text}: {finding}");
    }
}

#[test]
fn well_formed_documents_are_read() {
    let texts = [
        "<a/>",
        "\u{feff}<a/>",
        "<?xml version=\"1.0\" encoding=\"UTF-8\" standalone='yes'?>\n<!-- c --><?pi x?><a/><!-- d -->\n",
        "<?xml version='1.0' encoding='utf8'?><a/>",
        "<?xml version='1.0' encoding='UTF8'?><a/>",
        "<?xml version='1.0' encoding='ascii'?><a/>",
        "<?xml version='1.0' encoding='US-ASCII'?><a/>",
        "<a  b = '1'\tc=\"'\"\n></a >",
        "<é-1.x>ß</é-1.x>",
        "<a>&#x41;&lt;<![CDATA[<&]]>]] ></a>",
        "<p:a xmlns:p='u' p:b='1' b='2'/>",
        "<a xml:lang='de'/>",
    ];
    for text in texts {
        read(text, &[]).unwrap_or_else(|finding| panic!("{text}: {finding}"));
    }
}

#[test]
fn text_and_attributes_are_resolved() {
    let root = read("<a b='x&#10;y\n\tz &quot;'>1&#13;&amp;\r\n<![CDATA[<2>]]><!-- - -->3</a>", &[]).unwrap();
    assert_eq!(root.attr("b"), Some("x\ny  z \""));
    assert_eq!(root.text(), "1\r&\n<2>3");
    assert_eq!(root.write(), "<a b='x&#10;y  z &quot;'>1&#13;&amp;\n&lt;2&gt;<!-- - -->3</a>\n");
}

#[test]
fn paths_count_only_where_there_are_several() {
    let root = read("<d><x><y/></x><z/><x><y/><y e='1'/></x></d>", &[]).unwrap();
    let paths: Vec<_> = root.elements().flat_map(|e| e.elements()).map(|e| e.at.path.to_string()).collect();
    assert_eq!(paths, ["/x[1]/y", "/x[2]/y[1]", "/x[2]/y[2]"]);
    let last = root.elements().last().unwrap().elements().last().unwrap();
    assert_eq!(last.attributes[0].place().path.to_string(), "/x[2]/y[2]/@e");
    assert_eq!((last.attributes[0].at.line, last.attributes[0].at.column), (1, 29));
}

#[test]
fn verbatim_content_is_kept_to_the_letter() {
    let inner = "\n <x  a=\"1\"></x><!-- c --><![CDATA[&]]>&#65;\r\n";
    let text = format!("<domain><metadata>{inner}</metadata><n><metadata> </metadata></n></domain>");
    let root = read(&text, &[("domain", "metadata")]).unwrap();
    assert_eq!(
        root.write(),
        format!("<domain>\n  <metadata>{inner}</metadata>\n  <n>\n    <metadata> </metadata>\n  </n>\n</domain>\n")
    );
}

#[test]
fn limits_are_held_early() {
    let nested = |depth: usize| format!("{}{}", "<a>".repeat(depth), "</a>".repeat(depth));
    assert!(read(&nested(MAX_DEPTH), &[]).is_ok());
    assert!(refusal(&nested(MAX_DEPTH + 1)).message.contains("deep"));
    assert!(refusal(&"<a>".repeat(1_000_000)).message.contains("deep"));
    assert!(refusal(&format!("<a>{}</a>", "<b/>".repeat(MAX_ELEMENTS))).message.contains("elements"));
    let full = format!("<b {}/>", (0..200).map(|n| format!("a{n}=''")).collect::<Vec<_>>().join(" "));
    assert!(refusal(&format!("<a>{}</a>", full.repeat(1000))).message.contains("attributes and texts"));
    assert!(refusal(&format!("<a>{}</a>", "x<!---->".repeat(MAX_PIECES))).message.contains("attributes and texts"));
    let kept = format!("<domain><metadata>{}</metadata></domain>", full.repeat(1000));
    assert!(read(&kept, &[("domain", "metadata")]).is_ok(), "what is kept as it was written is no part of the tree");
    assert!(refusal(&" ".repeat(MAX_SIZE + 1)).message.contains("bytes"));
    let attributes: String = (0..300).map(|n| format!(" a{n}=''")).collect();
    assert!(refusal(&format!("<a{attributes}/>")).message.contains("attributes"));
    assert!(refusal(&format!("<{}/>", "a".repeat(300))).message.contains("longer"));
}

#[test]
fn a_long_line_and_a_long_document_are_read() {
    let line = format!("<a b='{0}'>{0}</a>", "x".repeat(64 << 10));
    assert!(read(&line, &[]).is_ok());
    let many = format!("<a>\n{}</a>", "<bcd e='f'>ghij</bcd>\n".repeat(MAX_ELEMENTS - 1));
    let root = read(&many, &[]).unwrap();
    assert_eq!(root.elements().last().unwrap().at.line as usize, MAX_ELEMENTS);
}

/// Pieces from which random near-XML is put together.
fn pieces() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "<a>",
        "</a>",
        "<b c='d'>",
        "</b>",
        "<e/>",
        "<p:x xmlns:p='u'>",
        "</p:x>",
        "<p:y/>",
        "text",
        " ",
        "\n",
        "&amp;",
        "&#65;",
        "&#1;",
        "&x;",
        "<!-- c -->",
        "<!--",
        "--",
        "-->",
        "<![CDATA[",
        "]]>",
        "<?pi d?>",
        "<?xml version='1.0'?>",
        "<!DOCTYPE a>",
        "<",
        ">",
        "'",
        "\"",
        "/",
        "=",
        "&",
        ":",
        "\u{0}",
        "\u{feff}",
        "é",
        "xmlns='v'",
        "<a b='1' b='2'/>",
        "<a  b=\"&lt;\" >",
        "]]",
        "\r\n",
        ";",
    ]);
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_accepted_is_well_formed(inner in pieces()) {
        for text in [inner.clone(), format!("<a>{inner}</a>"), format!("<a {inner}/>")] {
            if let Ok(root) = read(&text, &[]) {
                prop_assert!(roxmltree::Document::parse(&text).is_ok(), "{:?}: {:?}", text, roxmltree::Document::parse(&text).err());
                let written = root.write();
                prop_assert!(roxmltree::Document::parse(&written).is_ok(), "{written:?} from {text:?}");
            }
        }
    }
}
