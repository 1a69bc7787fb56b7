//! Which extents are free, and which of them a new or growing volume gets.

use super::{LogicalVolumeInfo, PhysicalVolume, Segment, SegmentKind, VolumeGroup};
use crate::format::{Section, Value};

impl VolumeGroup {
    /// Free extents of a physical volume: first and count, in order.
    pub(crate) fn free(&self, pv: &PhysicalVolume) -> Vec<(u64, u64)> {
        let mut used: Vec<(u64, u64)> =
            self.lvs.iter().flat_map(|lv| &lv.segments).flat_map(|s| s.uses(&pv.name)).collect();
        used.sort_unstable();
        let mut free = Vec::new();
        let mut next = 0;
        for (first, count) in used {
            if next < first {
                free.push((next, first - next));
            }
            next = next.max(first + count);
        }
        if next < pv.extents {
            free.push((next, pv.extents - next));
        }
        free
    }

    /// Appends linear segments for `extents` to `lv`: where it ends now if there is room behind it, else the largest
    /// free ranges first, so that a volume has few segments. `None` if there is too little room; nothing is changed then.
    pub(crate) fn grow(&self, lv: &LogicalVolumeInfo, extents: u64) -> Option<Vec<Segment>> {
        let mut segments = lv.segments.clone();
        let mut free: Vec<(String, u64, u64)> = self
            .pvs
            .iter()
            .filter(|pv| pv.is_allocatable())
            .flat_map(|pv| self.free(pv).into_iter().map(|(first, n)| (pv.name.clone(), first, n)))
            .collect();
        let end = segments.last().and_then(Segment::linear_end);
        // Stable: of ranges of one size the first physical volume's comes first.
        free.sort_by_key(|(pv, first, n)| (Some((pv.clone(), *first)) != end, u64::MAX - n));
        let mut start = lv.extents();
        let mut left = extents;
        for (pv, first, count) in free {
            if left == 0 {
                break;
            }
            let take = left.min(count);
            left -= take;
            match segments.last_mut() {
                Some(last) if last.linear_end() == Some((pv.clone(), first)) => last.extents += take,
                _ => segments.push(Segment {
                    start,
                    extents: take,
                    kind: SegmentKind::Striped { stripe_sectors: 0, stripes: vec![(pv, first)] },
                    other: Section::default(),
                }),
            }
            start += take;
        }
        (left == 0).then_some(segments)
    }
}

impl Segment {
    /// The physical volume and the extent right behind this segment, if it is linear.
    fn linear_end(&self) -> Option<(String, u64)> {
        match &self.kind {
            SegmentKind::Striped { stripes, .. } => match stripes.as_slice() {
                [(pv, first)] => Some((pv.clone(), first + self.extents)),
                _ => None,
            },
            SegmentKind::Other { .. } => None,
        }
    }

    /// What it uses of the physical volume `pv`: first extent and count.
    fn uses(&self, pv: &str) -> Vec<(u64, u64)> {
        match &self.kind {
            SegmentKind::Striped { stripes, .. } => {
                let each = self.extents / (stripes.len() as u64).max(1);
                stripes.iter().filter(|(name, _)| name == pv).map(|(_, first)| (*first, each)).collect()
            }
            // Of an unknown type: whatever looks like a place on the physical volume is taken for one, at full length.
            SegmentKind::Other { .. } => {
                let arrays = self.other.0.iter().filter_map(|(_, node)| match node {
                    crate::format::Node::Value(Value::Array(values)) => Some(values),
                    _ => None,
                });
                let place = |w: &[Value]| match w {
                    [Value::Text(name), Value::Int(first)] if name == pv => {
                        u64::try_from(*first).ok().map(|f| (f, self.extents))
                    }
                    _ => None,
                };
                arrays.flat_map(|a| a.windows(2).filter_map(place).collect::<Vec<_>>()).collect()
            }
        }
    }
}
