//! From the model to the text, in the order in which LVM2 writes it.

use super::{LogicalVolumeInfo, PhysicalVolume, Segment, SegmentKind, VolumeGroup};
use crate::format::{Section, Value};

/// Who writes, for people who read the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Writer<'a> {
    /// What was done.
    pub description: &'a str,
    /// This host's name.
    pub host: &'a str,
    /// Seconds since 1970.
    pub unix_seconds: u64,
}

fn words(list: &[String]) -> Value {
    Value::Array(list.iter().map(|w| Value::Text(w.clone())).collect())
}

fn int(n: u64) -> Value {
    Value::Int(i64::try_from(n).unwrap_or(i64::MAX))
}

impl VolumeGroup {
    /// The text as it goes on disk, with the NUL at its end.
    #[must_use]
    pub fn to_text(&self, writer: &Writer<'_>) -> Vec<u8> {
        let mut top = Section::default();
        top.push_section(&self.name, self.section());
        top.push("contents", "Text Format Volume Group".into());
        top.push("version", Value::Int(1));
        top.push("description", writer.description.into());
        top.push("creation_host", writer.host.into());
        top.push("creation_time", int(writer.unix_seconds));
        let mut text = top.to_string().into_bytes();
        text.push(0);
        text
    }

    fn section(&self) -> Section {
        let mut s = Section::default();
        s.push("id", self.id.to_string().as_str().into());
        s.push("seqno", int(u64::from(self.seqno)));
        s.push("status", words(&self.status));
        s.push("extent_size", int(self.extent_sectors));
        s.0.extend(self.other.0.iter().cloned());
        let mut pvs = Section::default();
        for pv in &self.pvs {
            pvs.push_section(&pv.name, pv.section());
        }
        s.push_section("physical_volumes", pvs);
        // LVM2 leaves the section out where there is nothing in it.
        if !self.lvs.is_empty() {
            let mut lvs = Section::default();
            for lv in &self.lvs {
                lvs.push_section(&lv.name, lv.section());
            }
            s.push_section("logical_volumes", lvs);
        }
        s
    }
}

impl PhysicalVolume {
    fn section(&self) -> Section {
        let mut s = Section::default();
        s.push("id", self.id.to_string().as_str().into());
        s.push("status", words(&self.status));
        s.0.extend(self.other.0.iter().cloned());
        s.push("pe_start", int(self.start_sectors));
        s.push("pe_count", int(self.extents));
        s
    }
}

impl LogicalVolumeInfo {
    fn section(&self) -> Section {
        let mut s = Section::default();
        s.push("id", self.id.to_string().as_str().into());
        s.push("status", words(&self.status));
        s.0.extend(self.other.0.iter().cloned());
        s.push("segment_count", int(self.segments.len() as u64));
        for (i, segment) in self.segments.iter().enumerate() {
            s.push_section(&format!("segment{}", i + 1), segment.section());
        }
        s
    }
}

impl Segment {
    fn section(&self) -> Section {
        let mut s = Section::default();
        s.push("start_extent", int(self.start));
        s.push("extent_count", int(self.extents));
        match &self.kind {
            SegmentKind::Striped { stripe_sectors, stripes } => {
                s.push("type", "striped".into());
                s.push("stripe_count", int(stripes.len() as u64));
                if *stripe_sectors != 0 {
                    s.push("stripe_size", int(*stripe_sectors));
                }
                let pair = |(pv, first): &(String, u64)| [Value::Text(pv.clone()), int(*first)];
                s.push("stripes", Value::Array(stripes.iter().flat_map(pair).collect()));
            }
            SegmentKind::Other { kind } => s.push("type", kind.as_str().into()),
        }
        s.0.extend(self.other.0.iter().cloned());
        s
    }
}
