//! Reader for the small XML answers of AWS.

use roxmltree::{Document, ParsingOptions};

/// Maximum number of nodes of an answer. AWS's have about 20.
const NODES_MAX: u32 = 1_000;

/// An XML answer.
pub(super) struct Xml<'a>(Document<'a>);

impl<'a> Xml<'a> {
    /// Parses an answer. Returns `None` for any other text, and for XML with a document type.
    pub(super) fn parse(text: &'a str) -> Option<Self> {
        let options = ParsingOptions { allow_dtd: false, nodes_limit: NODES_MAX, ..ParsingOptions::default() };
        Document::parse_with_options(text, options).ok().map(Self)
    }

    /// Text of the first child with a name, of the first element with another name.
    pub(super) fn text(&self, parent: &str, name: &str) -> Option<&str> {
        let parent = self.0.descendants().find(|node| node.tag_name().name() == parent)?;
        let child = parent.children().find(|node| node.tag_name().name() == name)?;
        child.text().filter(|text| !text.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_found_by_the_names_of_its_elements() {
        let text = "<?xml version=\"1.0\"?><E xmlns=\"urn:x\"><Error><Type>S</Type><Code>A&amp;B</Code></Error></E>";
        let xml = Xml::parse(text).unwrap();
        assert_eq!(xml.text("Error", "Code"), Some("A&B"));
        assert_eq!(xml.text("Error", "Message"), None);
        assert_eq!(xml.text("Credentials", "Code"), None);
    }

    #[test]
    fn hostile_text_is_refused() {
        let deep = format!("{}{}", "<a>".repeat(20_000), "</a>".repeat(20_000));
        let entities = "<!DOCTYPE a [<!ENTITY b \"bb\"><!ENTITY c \"&b;&b;\">]><a>&c;</a>";
        let file = "<!DOCTYPE a [<!ENTITY b SYSTEM \"file:///etc/passwd\">]><a>&b;</a>";
        for text in ["", "canary", "<a>", deep.as_str(), entities, file] {
            assert!(Xml::parse(text).is_none());
        }
    }
}
