//! Slots in the order of their experts.

use std::ops::Range;

/// The slots of one expert.
#[derive(Debug)]
pub struct Group {
    /// Its number.
    pub expert: usize,
    /// Where its slots are in [`Route::order`]; at least one.
    pub slots: Range<usize>,
}

/// Slots sorted by expert, and within an expert as they came. Those of no expert are left out.
#[derive(Debug)]
pub struct Route {
    /// The sorted slots.
    pub order: Vec<u32>,
    /// The experts that have any, ascending.
    pub groups: Vec<Group>,
}

impl Route {
    /// Sorts the slots of these experts, of `experts` that there are.
    pub fn new(ids: &[i64], experts: usize) -> Self {
        let expert_of = |id: &i64| usize::try_from(*id).ok().filter(|&id| id < experts);
        let mut next = vec![0usize; experts];
        ids.iter().filter_map(expert_of).for_each(|id| next[id] += 1);
        let (mut groups, mut at) = (Vec::new(), 0);
        for (expert, next) in next.iter_mut().enumerate() {
            let count = std::mem::replace(next, at);
            if count > 0 {
                groups.push(Group { expert, slots: at..at + count });
            }
            at += count;
        }
        let mut order = vec![0; at];
        for (slot, id) in ids.iter().enumerate() {
            if let Some(id) = expert_of(id) {
                order[next[id]] = slot as u32;
                next[id] += 1;
            }
        }
        Self { order, groups }
    }

    /// Where each of `slots` slots is in the order.
    pub fn places(&self, slots: usize) -> Vec<Option<u32>> {
        let mut places = vec![None; slots];
        for (place, &slot) in self.order.iter().enumerate() {
            places[slot as usize] = Some(place as u32);
        }
        places
    }
}
