//! Reservation keys registered on a device by anybody: SCSI persistent reservations and NVMe reservations.
//!
//! A cluster of another kind registers a key per node before it writes, so a registered key says that somebody uses the
//! device, on whatever host. Quorate itself registers none.
//!
//! | answer | offset | field |
//! |---|---|---|
//! | SCSI PERSISTENT RESERVE IN, READ KEYS (SPC-4 6.15.2), big-endian | 0, 4, 8 | generation (4), bytes of keys (4), keys (8 each) |
//! | NVMe Reservation Report (NVMe 1.4 section 6.13), little-endian | 0, 5, 24 | generation (4), registrants (2), 24 bytes each with the key at 16 |

#![expect(unsafe_code, reason = "no safe interface passes a command to a device")]

use std::os::fd::{AsFd, AsRawFd};

/// How many keys are asked for.
const KEYS_MAX: usize = 128;
/// How long the device may take.
const TIMEOUT_MS: u32 = 5_000;

const SG_IO: u32 = 0x2285;
const SG_FROM_DEVICE: i32 = -3;
const NVME_ID: u32 = 0x4e40;
const NVME_IO_COMMAND: u32 = 0xc048_4e43;

/// `sg_io_hdr` of `scsi/sg.h`.
#[repr(C)]
struct SgIo {
    interface: i32,
    direction: i32,
    command_bytes: u8,
    sense_bytes_max: u8,
    vectors: u16,
    data_bytes: u32,
    data: *mut u8,
    command: *const u8,
    sense: *mut u8,
    timeout_ms: u32,
    flags: u32,
    pack_id: i32,
    user: *mut u8,
    status: u8,
    masked_status: u8,
    message_status: u8,
    sense_bytes: u8,
    host_status: u16,
    driver_status: u16,
    missing_bytes: i32,
    duration_ms: u32,
    info: u32,
}

/// `nvme_passthru_cmd` of `linux/nvme_ioctl.h`.
#[repr(C)]
#[derive(Default)]
struct NvmeCommand {
    opcode: u8,
    flags: u8,
    reserved: u16,
    namespace: u32,
    words_2_3: [u32; 2],
    metadata: u64,
    data: u64,
    metadata_bytes: u32,
    data_bytes: u32,
    words_10_15: [u32; 6],
    timeout_ms: u32,
    result: u32,
}

#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<SgIo>() == 88, "the layout of the kernel's header");
const _: () = assert!(size_of::<NvmeCommand>() == 72, "the size is in the number of the call");

/// The keys registered on an open device; none where it is of a kind that knows no reservations, or does not answer.
pub(super) fn registered(device: impl AsFd) -> Vec<u64> {
    let fd = device.as_fd().as_raw_fd();
    scsi(fd).or_else(|| nvme(fd)).unwrap_or_default()
}

fn scsi(fd: i32) -> Option<Vec<u64>> {
    let mut data = [0_u8; 8 + 8 * KEYS_MAX];
    let mut sense = [0_u8; 32];
    let mut command = [0_u8; 10];
    command[0] = 0x5e; // PERSISTENT RESERVE IN, service action 0: READ KEYS
    command[7..9].copy_from_slice(&(data.len() as u16).to_be_bytes());
    let mut call = SgIo {
        interface: i32::from(b'S'),
        direction: SG_FROM_DEVICE,
        command_bytes: command.len() as u8,
        sense_bytes_max: sense.len() as u8,
        vectors: 0,
        data_bytes: data.len() as u32,
        data: data.as_mut_ptr(),
        command: command.as_ptr(),
        sense: sense.as_mut_ptr(),
        timeout_ms: TIMEOUT_MS,
        flags: 0,
        pack_id: 0,
        user: core::ptr::null_mut(),
        status: 0,
        masked_status: 0,
        message_status: 0,
        sense_bytes: 0,
        host_status: 0,
        driver_status: 0,
        missing_bytes: 0,
        duration_ms: 0,
        info: 0,
    };
    // SAFETY: the header names three live buffers with their lengths, and outlives the call, which is synchronous.
    let done = unsafe { libc::ioctl(fd, SG_IO as _, &raw mut call) };
    let answered = done == 0 && call.status == 0 && call.host_status == 0;
    answered.then(|| scsi_keys(&data))
}

fn nvme(fd: i32) -> Option<Vec<u64>> {
    // SAFETY: this call has no memory arguments.
    let namespace = u32::try_from(unsafe { libc::ioctl(fd, NVME_ID as _) }).ok().filter(|n| *n != 0)?;
    let mut data = [0_u8; 24 + 24 * KEYS_MAX];
    let mut call = NvmeCommand {
        opcode: 0x0e, // Reservation Report
        namespace,
        data: data.as_mut_ptr() as u64,
        data_bytes: data.len() as u32,
        timeout_ms: TIMEOUT_MS,
        ..NvmeCommand::default()
    };
    call.words_10_15[0] = (data.len() / 4 - 1) as u32;
    // SAFETY: the command names a live buffer with its length, and the call is synchronous.
    let done = unsafe { libc::ioctl(fd, NVME_IO_COMMAND as _, &raw mut call) };
    (done == 0).then(|| nvme_keys(&data))
}

fn scsi_keys(data: &[u8]) -> Vec<u64> {
    let Some(bytes) = data.get(4..8).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes) else {
        return Vec::new();
    };
    let keys = data.get(8..).unwrap_or_default();
    let there = keys.get(..bytes as usize).unwrap_or(keys);
    there.as_chunks().0.iter().map(|key| u64::from_be_bytes(*key)).collect()
}

fn nvme_keys(data: &[u8]) -> Vec<u64> {
    let count = data.get(5..7).and_then(|b| b.try_into().ok()).map_or(0, u16::from_le_bytes);
    let registrants = data.get(24..).unwrap_or_default().chunks_exact(24).take(count.into());
    registrants.filter_map(|r| r.get(16..24)?.try_into().ok()).map(u64::from_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_from_both_kinds_of_answers() {
        let mut scsi = vec![0, 0, 0, 9, 0, 0, 0, 16];
        scsi.extend_from_slice(&0x1234_u64.to_be_bytes());
        scsi.extend_from_slice(&u64::MAX.to_be_bytes());
        scsi.extend_from_slice(&[0; 64]);
        assert_eq!(scsi_keys(&scsi), [0x1234, u64::MAX]);
        assert_eq!(scsi_keys(&[0; 1032]), Vec::<u64>::new());
        let mut nvme = vec![0; 24];
        (nvme[4], nvme[5]) = (1, 2);
        for key in [7_u64, 8] {
            nvme.extend_from_slice(&[3, 0, 1, 0, 0, 0, 0, 0, 9, 9, 9, 9, 9, 9, 9, 9]);
            nvme.extend_from_slice(&key.to_le_bytes());
        }
        nvme.extend_from_slice(&[0; 24]);
        assert_eq!(nvme_keys(&nvme), [7, 8]);
    }

    proptest::proptest! {
        #[test]
        fn hostile_answers_name_no_more_keys_than_there_is_room_for(
            data in proptest::collection::vec(proptest::num::u8::ANY, 0..300),
        ) {
            assert!(scsi_keys(&data).len() <= data.len() / 8);
            assert!(nvme_keys(&data).len() <= data.len() / 24);
        }
    }

    #[test]
    fn a_file_has_no_keys() {
        assert_eq!(registered(std::fs::File::open("/proc/self/exe").unwrap()), Vec::<u64>::new());
    }
}
