//! The grammar of LVM2's metadata text: `key = value`, `section { ... }`, comments; parser and printer.
//!
//! Nothing is lost in between but comments and blanks: order and unknown keys are kept.

use core::fmt;
use core::fmt::Write as _;

/// How deep sections and arrays may be nested. Real metadata has five levels.
const DEPTH_MAX: usize = 32;

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A whole number.
    Int(i64),
    /// A number with a fraction, as it was written.
    Float(String),
    /// A text.
    Text(String),
    /// `[ a, b ]`, types may be mixed.
    Array(Vec<Value>),
}

/// What stands after a name.
#[derive(Clone, Debug, PartialEq)]
pub enum Node {
    /// `name = value`.
    Value(Value),
    /// `name { ... }`.
    Section(Section),
}

/// Names with values and sections, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Section(pub Vec<(String, Node)>);

/// Why a text cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {reason}")]
pub struct TextError {
    /// Counted from 1.
    pub line: usize,
    /// Counted from 1, in bytes.
    pub column: usize,
    /// What is wrong.
    pub reason: &'static str,
}

impl Section {
    /// Reads a text.
    ///
    /// # Errors
    /// The place and what is wrong there.
    pub fn parse(text: &str) -> Result<Self, TextError> {
        let mut parser = Parser { text: text.as_bytes(), at: 0 };
        let section = parser.items(0, false)?;
        Ok(section)
    }

    /// The value of `name`.
    #[must_use]
    pub fn value(&self, name: &str) -> Option<&Value> {
        self.0.iter().find_map(|(n, node)| match node {
            Node::Value(v) if n == name => Some(v),
            _ => None,
        })
    }

    /// The section `name`.
    #[must_use]
    pub fn section(&self, name: &str) -> Option<&Self> {
        self.0.iter().find_map(|(n, node)| match node {
            Node::Section(s) if n == name => Some(s),
            _ => None,
        })
    }

    /// The sections in it, in order.
    pub fn sections(&self) -> impl Iterator<Item = (&str, &Self)> {
        self.0.iter().filter_map(|(n, node)| match node {
            Node::Section(s) => Some((n.as_str(), s)),
            Node::Value(_) => None,
        })
    }

    /// The number `name`.
    #[must_use]
    pub fn int(&self, name: &str) -> Option<i64> {
        match self.value(name) {
            Some(Value::Int(i)) => Some(*i),
            _ => None,
        }
    }

    /// The text `name`.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.value(name) {
            Some(Value::Text(t)) => Some(t),
            _ => None,
        }
    }

    /// Adds a value at the end.
    pub fn push(&mut self, name: &str, value: Value) {
        self.0.push((name.to_owned(), Node::Value(value)));
    }

    /// Adds a section at the end.
    pub fn push_section(&mut self, name: &str, section: Self) {
        self.0.push((name.to_owned(), Node::Section(section)));
    }
}

/// As on disk: a line per item, no indentation.
impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, node) in &self.0 {
            match node {
                Node::Value(value) => writeln!(f, "{name} = {value}")?,
                Node::Section(section) => write!(f, "{name} {{\n{section}}}\n")?,
            }
        }
        Ok(())
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(i) => write!(f, "{i}"),
            Self::Float(text) => f.write_str(text),
            Self::Text(text) => {
                f.write_char('"')?;
                for c in text.chars() {
                    if matches!(c, '"' | '\\') {
                        f.write_char('\\')?;
                    }
                    f.write_char(c)?;
                }
                f.write_char('"')
            }
            Self::Array(values) => {
                f.write_char('[')?;
                for (i, value) in values.iter().enumerate() {
                    if 0 < i {
                        f.write_str(", ")?;
                    }
                    write!(f, "{value}")?;
                }
                f.write_char(']')
            }
        }
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    fn fail<T>(&self, reason: &'static str) -> Result<T, TextError> {
        let before = self.text.get(..self.at).unwrap_or(self.text);
        let line = 1 + before.iter().filter(|b| **b == b'\n').count();
        let column = 1 + before.iter().rev().take_while(|b| **b != b'\n').count();
        Err(TextError { line, column, reason })
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn skip_blanks(&mut self) {
        while let Some(byte) = self.peek() {
            if byte == b'#' {
                while self.peek().is_some_and(|b| b != b'\n') {
                    self.at += 1;
                }
            } else if byte.is_ascii_whitespace() {
                self.at += 1;
            } else {
                return;
            }
        }
    }

    fn take(&mut self, byte: u8, reason: &'static str) -> Result<(), TextError> {
        self.skip_blanks();
        if self.peek() == Some(byte) {
            self.at += 1;
            Ok(())
        } else {
            self.fail(reason)
        }
    }

    fn word(&mut self, allowed: impl Fn(u8) -> bool) -> String {
        let from = self.at;
        while self.peek().is_some_and(&allowed) {
            self.at += 1;
        }
        String::from_utf8_lossy(self.text.get(from..self.at).unwrap_or_default()).into_owned()
    }

    /// Items up to the end of the text, or of the section if `nested`.
    fn items(&mut self, depth: usize, nested: bool) -> Result<Section, TextError> {
        if DEPTH_MAX < depth {
            return self.fail("sections are nested too deep");
        }
        let mut section = Section::default();
        loop {
            self.skip_blanks();
            match self.peek() {
                None if nested => return self.fail("a section has no end"),
                None => return Ok(section),
                Some(b'}') if nested => {
                    self.at += 1;
                    return Ok(section);
                }
                Some(_) => {}
            }
            let name = self.word(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'+' | b'-'));
            if name.is_empty() {
                return self.fail("a name is wanted");
            }
            self.skip_blanks();
            let node = match self.peek() {
                Some(b'{') => {
                    self.at += 1;
                    Node::Section(self.items(depth + 1, true)?)
                }
                Some(b'=') => {
                    self.at += 1;
                    Node::Value(self.value(depth)?)
                }
                _ => return self.fail("`=` or `{` is wanted"),
            };
            section.0.push((name, node));
        }
    }

    fn value(&mut self, depth: usize) -> Result<Value, TextError> {
        if DEPTH_MAX < depth {
            return self.fail("arrays are nested too deep");
        }
        self.skip_blanks();
        match self.peek() {
            Some(b'"') => self.string(),
            Some(b'[') => self.array(depth),
            Some(b) if b.is_ascii_digit() || matches!(b, b'-' | b'+' | b'.') => self.number(),
            _ => self.fail("a number, a text or an array is wanted"),
        }
    }

    fn array(&mut self, depth: usize) -> Result<Value, TextError> {
        self.at += 1;
        let mut values = Vec::new();
        loop {
            self.skip_blanks();
            if self.peek() == Some(b']') {
                self.at += 1;
                return Ok(Value::Array(values));
            }
            if !values.is_empty() {
                self.take(b',', "`,` or `]` is wanted")?;
            }
            values.push(self.value(depth + 1)?);
        }
    }

    fn string(&mut self) -> Result<Value, TextError> {
        self.at += 1;
        let mut bytes = Vec::new();
        loop {
            match self.peek() {
                None => return self.fail("a text has no end"),
                Some(b'"') => break,
                Some(b'\\') => {
                    self.at += 1;
                    let Some(byte) = self.peek() else { return self.fail("a text has no end") };
                    bytes.push(byte);
                }
                Some(byte) => bytes.push(byte),
            }
            self.at += 1;
        }
        self.at += 1;
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Value::Text(text)),
            Err(_) => self.fail("a text is not UTF-8"),
        }
    }

    fn number(&mut self) -> Result<Value, TextError> {
        let word = self.word(|b| b.is_ascii_digit() || matches!(b, b'-' | b'+' | b'.' | b'e' | b'E'));
        if let Ok(int) = word.parse() {
            return Ok(Value::Int(int));
        }
        if word.parse::<f64>().is_ok_and(f64::is_finite) && word.contains('.') {
            return Ok(Value::Float(word));
        }
        self.fail("not a number of 64 bits")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_of_the_grammar_is_read_and_printed_back() {
        let text = "vg {\nid = \"a\\\"b\\\\c\"\nseqno = -3\nratio = 1.50\nempty = []\nmixed = [\"pv0\", 7]\nin {\n}\n}\n";
        let section = Section::parse(text).unwrap();
        assert_eq!(section.to_string(), text);
        assert_eq!(section.section("vg").and_then(|v| v.text("id")), Some("a\"b\\c"));
        let loose = "# a comment\nvg{id=\"x\"seqno=1 l=[1,2]}version=1";
        assert_eq!(
            Section::parse(loose).unwrap().to_string(),
            "vg {\nid = \"x\"\nseqno = 1\nl = [1, 2]\n}\nversion = 1\n"
        );
    }

    #[test]
    fn an_error_names_line_and_column() {
        let error = Section::parse("a = 1\nb b = 2").unwrap_err();
        assert_eq!(error.to_string(), "line 2, column 3: `=` or `{` is wanted");
        for bad in ["a = ", "a {", "a = \"x", "a = [1 2]", "= 1", "a = 99999999999999999999", "}", "a = -"] {
            assert!(Section::parse(bad).is_err(), "{bad}");
        }
        assert!(Section::parse(&"a {".repeat(100)).is_err());
        assert!(Section::parse(&format!("a = {}", "[".repeat(100))).is_err());
    }
}
