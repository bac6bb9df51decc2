//! A TOML text as a tree in which every key and value knows its line.
//!
//! The only file that knows the toml crate. Its errors are passed on as line and message, never with the text of the
//! line: that may hold a password.

use std::ops::Range;
use toml::de::{DeTable, DeValue};

/// A value, and the line (from 1) where it stands. No Debug: it may hold a password.
#[derive(Clone)]
pub(super) struct Node {
    pub(super) line: usize,
    pub(super) value: Value,
}

#[derive(Clone)]
pub(super) enum Value {
    Text(String),
    Number(i64),
    Fraction(f64),
    Flag(bool),
    List(Vec<Node>),
    Table(Table),
    /// What no option can be, with its name in words.
    Other(&'static str),
}

pub(super) type Table = Vec<Entry>;

#[derive(Clone)]
pub(super) struct Entry {
    pub(super) key: String,
    /// Where the key stands; of a section, where its first header stands.
    pub(super) line: usize,
    pub(super) node: Node,
}

/// The tree of a whole file, or the line and text of its first syntax error.
pub(super) fn parse(text: &str) -> Result<Table, (usize, String)> {
    let lines = Lines::of(text);
    match DeTable::parse(text) {
        Ok(table) => Ok(lines.table(table.get_ref())),
        Err(e) => Err((lines.at(e.span().unwrap_or(0..0)), e.message().trim().replace('\n', ", "))),
    }
}

struct Lines {
    /// The offset at which each line but the first begins.
    starts: Vec<usize>,
    /// The last line that has text: an error at the very end of a file is shown there.
    last: usize,
}

impl Lines {
    fn of(text: &str) -> Self {
        let starts = text.bytes().enumerate().filter(|(_, b)| *b == b'\n').map(|(i, _)| i + 1).collect();
        Lines { starts, last: text.lines().count().max(1) }
    }

    fn at(&self, span: Range<usize>) -> usize {
        (self.starts.partition_point(|start| *start <= span.start) + 1).min(self.last)
    }

    fn table(&self, table: &DeTable<'_>) -> Table {
        table
            .iter()
            .map(|(key, value)| Entry {
                key: key.get_ref().to_string(),
                line: self.at(key.span()),
                node: Node { line: self.at(value.span()), value: self.value(value.get_ref()) },
            })
            .collect()
    }

    fn value(&self, value: &DeValue<'_>) -> Value {
        match value {
            DeValue::String(s) => Value::Text(s.to_string()),
            DeValue::Integer(i) => i64::from_str_radix(i.as_str(), i.radix())
                .map_or(Value::Other("a number beyond 64 bits"), Value::Number),
            DeValue::Float(f) => f.as_str().parse().map_or(Value::Other("an unreadable number"), Value::Fraction),
            DeValue::Boolean(b) => Value::Flag(*b),
            DeValue::Datetime(_) => Value::Other("a date"),
            DeValue::Array(items) => Value::List(
                items.iter().map(|i| Node { line: self.at(i.span()), value: self.value(i.get_ref()) }).collect(),
            ),
            DeValue::Table(table) => Value::Table(self.table(table)),
        }
    }
}

impl Node {
    pub(super) fn text(&self) -> Option<&str> {
        if let Value::Text(text) = &self.value { Some(text) } else { None }
    }

    pub(super) fn number(&self) -> Option<i64> {
        if let Value::Number(number) = self.value { Some(number) } else { None }
    }

    pub(super) fn flag(&self) -> Option<bool> {
        if let Value::Flag(flag) = self.value { Some(flag) } else { None }
    }

    pub(super) fn list(&self) -> Option<&[Node]> {
        if let Value::List(items) = &self.value { Some(items) } else { None }
    }

    pub(super) fn table(&self) -> Option<&Table> {
        if let Value::Table(table) = &self.value { Some(table) } else { None }
    }

    /// What was found, in words: for messages about options that are no secret.
    pub(super) fn found(&self) -> String {
        match &self.value {
            Value::Text(s) => format!("{s:?}"),
            Value::Number(n) => n.to_string(),
            Value::Fraction(f) => f.to_string(),
            Value::Flag(b) => b.to_string(),
            Value::List(_) | Value::Table(_) | Value::Other(_) => self.shape().to_owned(),
        }
    }

    /// What kind of value was found, without the value.
    pub(super) fn shape(&self) -> &'static str {
        match &self.value {
            Value::Text(_) => "text in quotes",
            Value::Number(_) | Value::Fraction(_) => "a number",
            Value::Flag(_) => "true or false",
            Value::List(_) => "a list",
            Value::Table(_) => "a section",
            Value::Other(shape) => shape,
        }
    }
}
