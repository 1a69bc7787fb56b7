//! From the text to the model, with the checks that LVM2's own tools make.

use super::{
    LogicalVolumeInfo, NAME_BYTES_MAX, PARTS_MAX, PhysicalVolume, Segment, SegmentKind, VolumeGroup,
};
use crate::format::{Node, Section, TextError, Uuid, Value};
use std::collections::BTreeSet;

/// The largest extent count or sector number that is read: far above every disk, far below an overflow.
const COUNT_MAX: u64 = 1 << 52;

/// Why a text is no volume group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// It does not follow the grammar.
    #[error("metadata: {0}")]
    Text(#[from] TextError),
    /// It is not LVM2's metadata, or of another version.
    #[error("metadata: `contents` and `version` are not those of LVM2 metadata, version 1")]
    Contents,
    /// There is no section of a volume group, or several.
    #[error("metadata: one volume group is wanted, {0} are there")]
    Groups(usize),
    /// Something obligatory is missing, or is no such value.
    #[error("{place}: {key} is missing or wrong")]
    Key {
        /// In which section.
        place: String,
        /// Which key.
        key: &'static str,
    },
    /// Parts that do not fit together.
    #[error("{place}: {reason}")]
    Parts {
        /// Where.
        place: String,
        /// What is wrong.
        reason: &'static str,
    },
}

impl VolumeGroup {
    /// Reads a metadata text, as found on disk (a NUL at its end is fine).
    ///
    /// # Errors
    /// See [`ModelError`].
    pub fn parse(text: &[u8]) -> Result<Self, ModelError> {
        let text = String::from_utf8_lossy(text);
        let top = Section::parse(text.trim_end_matches('\0'))?;
        if top.text("contents") != Some("Text Format Volume Group") || top.int("version") != Some(1) {
            return Err(ModelError::Contents);
        }
        let mut sections = top.sections();
        let (Some((name, section)), None) = (sections.next(), sections.next()) else {
            return Err(ModelError::Groups(top.sections().count()));
        };
        let group = Self::read(name, section)?;
        group.check()?;
        Ok(group)
    }

    fn read(name: &str, section: &Section) -> Result<Self, ModelError> {
        let of = Reader { place: name, section };
        let seqno = u32::try_from(of.count("seqno")?).map_err(|_| of.wrong("seqno"))?;
        let pvs = section.section("physical_volumes").ok_or_else(|| of.wrong("physical_volumes"))?;
        let lvs = section.section("logical_volumes");
        let extent_sectors = of.count("extent_size")?;
        if extent_sectors == 0 || u64::from(u32::MAX) < extent_sectors {
            return Err(of.wrong("extent_size"));
        }
        limit(name, pvs)?;
        lvs.map_or(Ok(()), |l| limit(name, l))?;
        Ok(Self {
            name: name.to_owned(),
            id: of.uuid("id")?,
            seqno,
            status: of.words("status")?,
            extent_sectors,
            pvs: pvs.sections().map(|(n, s)| read_pv(n, s)).collect::<Result<_, _>>()?,
            lvs: lvs
                .into_iter()
                .flat_map(Section::sections)
                .map(|(n, s)| read_lv(n, s))
                .collect::<Result<_, _>>()?,
            other: rest(
                section,
                &["id", "seqno", "status", "extent_size", "physical_volumes", "logical_volumes"],
            ),
        })
    }

    /// Checks what the sections cannot show one by one.
    pub(crate) fn check(&self) -> Result<(), ModelError> {
        let fail = |place: &str, reason| Err(ModelError::Parts { place: place.to_owned(), reason });
        if check_name(&self.name).is_err() {
            return fail("volume group", "its name is none that LVM2 allows");
        }
        let mut names = BTreeSet::new();
        let mut ids = BTreeSet::new();
        for pv in &self.pvs {
            if !names.insert(&pv.name) || !ids.insert(pv.id) {
                return fail(&pv.name, "a second physical volume of this name or identifier");
            }
            let end = pv.extents.checked_mul(self.extent_sectors);
            if end.and_then(|e| e.checked_add(pv.start_sectors)).is_none_or(|e| COUNT_MAX < e) {
                return fail(&pv.name, "more extents than any disk has");
            }
        }
        names.clear();
        ids.clear();
        let mut used: Vec<(&str, u64, u64)> = Vec::new();
        for lv in &self.lvs {
            if check_name(&lv.name).is_err() || !names.insert(&lv.name) || !ids.insert(lv.id) {
                return fail(&lv.name, "a bad name, or a second volume of this name or identifier");
            }
            let mut next = 0;
            for segment in &lv.segments {
                if segment.start != next || segment.extents == 0 {
                    return fail(&lv.name, "its segments leave gaps or overlap");
                }
                next = segment.start + segment.extents;
                let SegmentKind::Striped { stripe_sectors, stripes } = &segment.kind else { continue };
                let count = stripes.len() as u64;
                if count == 0 || !segment.extents.is_multiple_of(count) {
                    return fail(&lv.name, "its extents do not divide among its stripes");
                }
                if 1 < count && *stripe_sectors == 0 {
                    return fail(&lv.name, "stripe_size is missing");
                }
                for (pv, first) in stripes {
                    let Some(pv) = self.pv(pv) else {
                        // A stripe may be another volume, which this crate does not use.
                        if self.lv(pv).is_some() {
                            continue;
                        }
                        return fail(&lv.name, "a stripe is on an unknown physical volume");
                    };
                    let extents = segment.extents / count;
                    if first.checked_add(extents).is_none_or(|end| pv.extents < end) {
                        return fail(&lv.name, "a stripe reaches beyond its physical volume");
                    }
                    used.push((&pv.name, *first, first + extents));
                }
            }
        }
        used.sort_unstable();
        let overlap = used.windows(2).any(|w| w[0].0 == w[1].0 && w[1].1 < w[0].2);
        if overlap { fail(&self.name, "two segments use the same extents") } else { Ok(()) }
    }
}

/// LVM2's rules for names.
pub(crate) fn check_name(name: &str) -> Result<(), &'static str> {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'_' | b'.' | b'-');
    if name.is_empty() || NAME_BYTES_MAX < name.len() {
        return Err("a name has 1 to 127 bytes");
    }
    if !name.bytes().all(good) {
        return Err("a name has letters, digits and `+ _ . -` only");
    }
    if name.starts_with('-') || matches!(name, "." | "..") {
        return Err("a name may not start with `-`, nor be `.` or `..`");
    }
    Ok(())
}

fn limit(place: &str, section: &Section) -> Result<(), ModelError> {
    if PARTS_MAX < section.0.len() {
        return Err(ModelError::Parts { place: place.to_owned(), reason: "too many parts" });
    }
    Ok(())
}

/// What is left of a section without the keys that the model has.
fn rest(section: &Section, known: &[&str]) -> Section {
    Section(section.0.iter().filter(|(name, _)| !known.contains(&name.as_str())).cloned().collect())
}

fn read_pv(name: &str, section: &Section) -> Result<PhysicalVolume, ModelError> {
    let of = Reader { place: name, section };
    Ok(PhysicalVolume {
        name: name.to_owned(),
        id: of.uuid("id")?,
        status: of.words("status")?,
        start_sectors: of.count("pe_start")?,
        extents: of.count("pe_count")?,
        other: rest(section, &["id", "status", "pe_start", "pe_count"]),
    })
}

fn read_lv(name: &str, section: &Section) -> Result<LogicalVolumeInfo, ModelError> {
    let of = Reader { place: name, section };
    let count = of.count("segment_count")?;
    let is_segment = |n: &str| n.strip_prefix("segment").is_some_and(|d| d.parse::<u32>().is_ok());
    limit(name, section)?;
    let segments: Vec<Segment> = section
        .sections()
        .filter(|(n, _)| is_segment(n))
        .map(|(_, s)| read_segment(name, s))
        .collect::<Result<_, _>>()?;
    if segments.len() as u64 != count {
        return Err(ModelError::Parts {
            place: name.to_owned(),
            reason: "segment_count is not the count of segments",
        });
    }
    let mut other = rest(section, &["id", "status", "segment_count"]);
    other.0.retain(|(n, node)| !(matches!(node, Node::Section(_)) && is_segment(n)));
    Ok(LogicalVolumeInfo {
        name: name.to_owned(),
        id: of.uuid("id")?,
        status: of.words("status")?,
        segments,
        other,
    })
}

fn read_segment(lv: &str, section: &Section) -> Result<Segment, ModelError> {
    let of = Reader { place: lv, section };
    let kind = section.text("type").ok_or_else(|| of.wrong("type"))?;
    let (kind, mut other) = if matches!(kind, "striped" | "linear") {
        let stripes = match section.value("stripes") {
            Some(Value::Array(values)) => read_stripes(values).ok_or_else(|| of.wrong("stripes"))?,
            _ => return Err(of.wrong("stripes")),
        };
        let count = section.int("stripe_count").unwrap_or(1);
        if usize::try_from(count) != Ok(stripes.len()) {
            return Err(of.wrong("stripe_count"));
        }
        let stripe_sectors = match section.value("stripe_size") {
            Some(_) => of.count("stripe_size")?,
            None => 0,
        };
        let other = rest(section, &["type", "stripe_count", "stripe_size", "stripes"]);
        (SegmentKind::Striped { stripe_sectors, stripes }, other)
    } else {
        (SegmentKind::Other { kind: kind.to_owned() }, rest(section, &["type"]))
    };
    other = rest(&other, &["start_extent", "extent_count"]);
    Ok(Segment { start: of.count("start_extent")?, extents: of.count("extent_count")?, kind, other })
}

fn read_stripes(values: &[Value]) -> Option<Vec<(String, u64)>> {
    if !values.len().is_multiple_of(2) {
        return None;
    }
    let pair = |p: &[Value]| match p {
        [Value::Text(name), Value::Int(first)] => Some((name.clone(), u64::try_from(*first).ok()?)),
        _ => None,
    };
    values.chunks(2).map(pair).collect()
}

/// Reads obligatory keys of a section.
struct Reader<'a> {
    place: &'a str,
    section: &'a Section,
}

impl Reader<'_> {
    fn wrong(&self, key: &'static str) -> ModelError {
        ModelError::Key { place: self.place.to_owned(), key }
    }

    fn count(&self, key: &'static str) -> Result<u64, ModelError> {
        let value = self.section.int(key).and_then(|i| u64::try_from(i).ok());
        value.filter(|v| *v <= COUNT_MAX).ok_or_else(|| self.wrong(key))
    }

    fn uuid(&self, key: &'static str) -> Result<Uuid, ModelError> {
        self.section.text(key).and_then(|t| t.parse().ok()).ok_or_else(|| self.wrong(key))
    }

    /// A list of words; LVM2 also writes a single one without brackets.
    fn words(&self, key: &'static str) -> Result<Vec<String>, ModelError> {
        let word = |v: &Value| match v {
            Value::Text(t) => Some(t.clone()),
            _ => None,
        };
        let words = match self.section.value(key) {
            Some(Value::Array(values)) => values.iter().map(word).collect::<Option<_>>(),
            Some(value) => word(value).map(|w| vec![w]),
            None => None,
        };
        words.ok_or_else(|| self.wrong(key))
    }
}
