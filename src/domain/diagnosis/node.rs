//! Nodes that a pod can run on, and the platforms that its images need for them.

use std::collections::BTreeMap;

use super::{pod::Lookup, registry::Platform};

/// Labels of nodes that name their platform.
const ARCHITECTURE_LABEL: &str = "kubernetes.io/arch";
const OS_LABEL: &str = "kubernetes.io/os";
/// Operating system of a node selector without one.
const DEFAULT_OS: &str = "linux";

/// A node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Name.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

impl Node {
    fn platform(&self) -> Option<Platform> {
        Platform::parse(self.labels.get(OS_LABEL)?, self.labels.get(ARCHITECTURE_LABEL)?)
    }
}

/// Nodes that a pod admits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeChoice {
    /// Name of its node, if it was scheduled.
    pub name: Option<String>,
    /// Its node selector.
    pub selector: BTreeMap<String, String>,
}

impl NodeChoice {
    /// Nodes with this architecture.
    #[must_use]
    pub fn of_architecture(architecture: &str) -> Self {
        let selector = BTreeMap::from([(ARCHITECTURE_LABEL.to_owned(), architecture.to_owned())]);
        Self { name: None, selector }
    }

    fn admits(&self, node: &Node) -> bool {
        self.name.as_ref().is_none_or(|name| *name == node.name)
            && self.selector.iter().all(|(label, value)| node.labels.get(label) == Some(value))
    }

    /// Returns the platforms that the pod may run on: those of the nodes that it admits, or else the
    /// one that its node selector names. Empty if neither is known.
    ///
    /// Taints and affinity are not considered, so it may be fewer.
    pub(super) fn platforms(&self, nodes: &Lookup<Vec<Node>>) -> Vec<Platform> {
        let nodes: &[Node] = if let Lookup::Found(nodes) = nodes { nodes } else { &[] };
        let mut platforms: Vec<Platform> =
            nodes.iter().filter(|node| self.admits(node)).filter_map(Node::platform).collect();
        if platforms.is_empty() {
            let os = self.selector.get(OS_LABEL).map_or(DEFAULT_OS, String::as_str);
            let selected = self.selector.get(ARCHITECTURE_LABEL);
            platforms.extend(selected.and_then(|architecture| Platform::parse(os, architecture)));
        }
        platforms.sort_unstable();
        platforms.dedup();
        platforms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, architecture: &str, pool: &str) -> Node {
        let labels = [(OS_LABEL, "linux"), (ARCHITECTURE_LABEL, architecture), ("pool", pool)];
        let labels = labels.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned()));
        Node { name: name.to_owned(), labels: labels.collect() }
    }

    fn platforms(choice: &NodeChoice, nodes: &Lookup<Vec<Node>>) -> String {
        let platforms = choice.platforms(nodes).into_iter();
        platforms.map(|platform| platform.to_string()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn platforms_are_those_of_the_admitted_nodes() {
        let nodes = Lookup::Found(vec![
            node("a", "amd64", "main"),
            node("b", "arm64", "main"),
            node("c", "s390x", "other"),
            node("d", "CANARY x", "main"),
        ]);
        let mut choice = NodeChoice::default();
        assert_eq!(platforms(&choice, &nodes), "linux/amd64 linux/arm64 linux/s390x");
        choice.selector.insert("pool".to_owned(), "main".to_owned());
        assert_eq!(platforms(&choice, &nodes), "linux/amd64 linux/arm64");
        choice.name = Some("b".to_owned());
        assert_eq!(platforms(&choice, &nodes), "linux/arm64");
    }

    #[test]
    fn node_selector_decides_if_no_node_is_known() {
        let choice = NodeChoice::of_architecture("s390x");
        for nodes in [Lookup::Forbidden, Lookup::Found(Vec::new()), Lookup::Found(vec![node("a", "amd64", "x")])] {
            assert_eq!(platforms(&choice, &nodes), "linux/s390x");
        }
        assert_eq!(platforms(&NodeChoice::default(), &Lookup::Forbidden), "");
        assert_eq!(platforms(&NodeChoice::of_architecture("x y"), &Lookup::Forbidden), "");
    }
}
