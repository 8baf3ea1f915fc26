//! Compares the hand-written sizes, offsets, opcodes and constants with the system's headers.
//!
//! `layout.c` prints the values of the headers as `name=value`; the functions here collect the values of
//! this crate under the same names. Names and values must be equal. [`NEWER`] lists what the installed
//! headers may lack; the test prints what they do lack on stderr.

use rdma_sys_ext::{dma_buf, dma_heap, rdma_cm, symbols, udmabuf, uverbs::abi, verbs, vfio};
use std::collections::BTreeMap;
use std::io::Write;
use std::mem::offset_of;
use std::path::Path;
use std::process::Command;

type Facts = BTreeMap<String, u64>;

/// A definition that not all headers have.
struct Newer {
    /// The macro that makes `layout.c` print the values and check the prototypes.
    have: &'static str,
    /// Text that occurs in the headers that have the definition.
    text: &'static str,
    since: &'static str,
    add: fn(&mut Facts),
}

const NEWER: &[Newer] = &[
    Newer {
        have: "HAVE_SYNC_FILE",
        text: "struct dma_buf_import_sync_file {",
        since: "Linux 6.0",
        add: sync_file,
    },
    Newer {
        have: "HAVE_REG_MR_EX",
        text: "struct ibv_mr_init_attr {",
        since: "rdma-core 59",
        add: reg_mr_ex,
    },
    Newer {
        have: "HAVE_DM_EXPORT",
        text: "ibv_dm_export_dmabuf_fd(",
        since: "rdma-core 62",
        add: prototype_only,
    },
    Newer { have: "HAVE_BUF", text: "ibv_alloc_buf(", since: "rdma-core 64", add: buf },
    Newer {
        have: "HAVE_BUF_EXPORT",
        text: "ibv_export_buf_dmabuf_fd(",
        since: "rdma-core 65",
        add: prototype_only,
    },
    Newer { have: "HAVE_MLX5_REG_DMABUF", text: "mlx5dv_reg_dmabuf_mr(", since: "rdma-core 54", add: mlx5 },
    Newer {
        have: "HAVE_VFIO_DMA_BUF",
        text: "struct vfio_device_feature_dma_buf {",
        since: "Linux 6.19",
        add: vfio_dma_buf,
    },
    Newer {
        have: "HAVE_HSA",
        text: "hsa_amd_portable_export_dmabuf(",
        since: "ROCm 5.6, if installed",
        add: exporters::hsa,
    },
    Newer {
        have: "HAVE_LEVEL_ZERO",
        text: "zeMemAllocDevice(",
        since: "oneAPI Level Zero, if installed",
        add: exporters::level_zero,
    },
];

/// The size of the field that `get` borrows.
fn size_of_field<T, F>(_get: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// Adds fields of a struct under its C name.
macro_rules! fields {
    ($facts:ident: $c:literal = $type:path { $($field:ident),* $(,)? }) => {$(
        $facts.insert(
            concat!($c, ".", stringify!($field)).into(),
            offset_of!($type, $field) as u64,
        );
        $facts.insert(
            concat!("sizeof ", $c, ".", stringify!($field)).into(),
            size_of_field(|value: &$type| &value.$field) as u64,
        );
    )*};
}

/// Adds the size and the fields of a struct. All fields must be named.
macro_rules! whole {
    ($facts:ident: $c:literal = $type:path { $($field:ident),* $(,)? }) => {
        values!($facts: "struct " $c = size_of::<$type>());
        fields!($facts: $c = $type { $($field),* });
        let _ = |value: $type| { let $type { $($field: _),* } = value; };
    };
}

/// Adds constants under their C names.
macro_rules! values {
    ($facts:ident: $($($c:literal)+ = $value:expr),* $(,)?) => {$(
        $facts.insert(concat!($($c),+).into(), $value as u64);
    )*};
}

// It uses the macros above.
mod layout_exporters;
use layout_exporters as exporters;

fn uverbs(facts: &mut Facts) {
    values!(facts:
        "RDMA_VERBS_IOCTL" = abi::IOCTL,
        "UVERBS_ATTR_F_MANDATORY" = abi::ATTR_F_MANDATORY,
        "UVERBS_ATTR_F_VALID_OUTPUT" = abi::ATTR_F_VALID_OUTPUT,
        "UVERBS_OBJECT_MR" = abi::OBJECT_MR,
        "UVERBS_METHOD_MR_DESTROY" = abi::MR_DESTROY,
        "UVERBS_METHOD_REG_DMABUF_MR" = abi::MR_REG_DMABUF,
        "UVERBS_ATTR_DESTROY_MR_HANDLE" = abi::DESTROY_MR_HANDLE,
        "UVERBS_ATTR_REG_DMABUF_MR_HANDLE" = abi::REG_DMABUF_MR_HANDLE,
        "UVERBS_ATTR_REG_DMABUF_MR_PD_HANDLE" = abi::REG_DMABUF_MR_PD_HANDLE,
        "UVERBS_ATTR_REG_DMABUF_MR_OFFSET" = abi::REG_DMABUF_MR_OFFSET,
        "UVERBS_ATTR_REG_DMABUF_MR_LENGTH" = abi::REG_DMABUF_MR_LENGTH,
        "UVERBS_ATTR_REG_DMABUF_MR_IOVA" = abi::REG_DMABUF_MR_IOVA,
        "UVERBS_ATTR_REG_DMABUF_MR_FD" = abi::REG_DMABUF_MR_FD,
        "UVERBS_ATTR_REG_DMABUF_MR_ACCESS_FLAGS" = abi::REG_DMABUF_MR_ACCESS_FLAGS,
        "UVERBS_ATTR_REG_DMABUF_MR_RESP_LKEY" = abi::REG_DMABUF_MR_RESP_LKEY,
        "UVERBS_ATTR_REG_DMABUF_MR_RESP_RKEY" = abi::REG_DMABUF_MR_RESP_RKEY,
        "attributes begin at" = size_of::<abi::Header>(),
    );
    whole!(facts: "ib_uverbs_ioctl_hdr" = abi::Header {
        length, object_id, method_id, num_attrs, reserved1, driver_id, reserved2,
    });
    whole!(facts: "ib_uverbs_attr" = abi::Attribute { attr_id, len, flags, attr_data, data });
}

fn dma_bufs(facts: &mut Facts) {
    values!(facts:
        "DMA_BUF_MAGIC" = dma_buf::MAGIC,
        "DMA_BUF_NAME_LEN" = dma_buf::NAME_LEN,
        "DMA_BUF_SYNC_READ" = dma_buf::SYNC_READ,
        "DMA_BUF_SYNC_WRITE" = dma_buf::SYNC_WRITE,
        "DMA_BUF_SYNC_RW" = dma_buf::SYNC_RW,
        "DMA_BUF_SYNC_START" = dma_buf::SYNC_START,
        "DMA_BUF_SYNC_END" = dma_buf::SYNC_END,
        "DMA_BUF_IOCTL_SYNC" = dma_buf::IOCTL_SYNC,
        "DMA_BUF_SET_NAME_B" = dma_buf::SET_NAME_B,
        "UDMABUF_FLAGS_CLOEXEC" = udmabuf::FLAGS_CLOEXEC,
        "UDMABUF_CREATE" = udmabuf::IOCTL_CREATE,
        "UDMABUF_CREATE_LIST" = udmabuf::IOCTL_CREATE_LIST,
        "items begin at" = size_of::<udmabuf::ListHeader>(),
        "DMA_HEAP_IOCTL_ALLOC" = dma_heap::IOCTL_ALLOC,
    );
    whole!(facts: "dma_buf_sync" = dma_buf::SyncRequest { flags });
    whole!(facts: "udmabuf_create" = udmabuf::Create { memfd, flags, offset, size });
    whole!(facts: "udmabuf_create_list" = udmabuf::ListHeader { flags, count });
    whole!(facts: "udmabuf_create_item" = udmabuf::ListItem { memfd, pad, offset, size });
    whole!(facts: "dma_heap_allocation_data" = dma_heap::AllocationData {
        len, fd, fd_flags, heap_flags,
    });
}

fn vfios(facts: &mut Facts) {
    values!(facts:
        "VFIO_API_VERSION" = vfio::API_VERSION,
        "VFIO_TYPE1v2_IOMMU" = vfio::TYPE1V2_IOMMU,
        "VFIO_GROUP_FLAGS_VIABLE" = vfio::GROUP_FLAGS_VIABLE,
        "VFIO_DEVICE_FEATURE_GET" = vfio::FEATURE_GET,
        "VFIO_DEVICE_FEATURE_PROBE" = vfio::FEATURE_PROBE,
        "VFIO_GET_API_VERSION" = vfio::IOCTL_GET_API_VERSION,
        "VFIO_SET_IOMMU" = vfio::IOCTL_SET_IOMMU,
        "VFIO_GROUP_GET_STATUS" = vfio::IOCTL_GROUP_GET_STATUS,
        "VFIO_GROUP_SET_CONTAINER" = vfio::IOCTL_GROUP_SET_CONTAINER,
        "VFIO_GROUP_GET_DEVICE_FD" = vfio::IOCTL_GROUP_GET_DEVICE_FD,
        "VFIO_DEVICE_FEATURE" = vfio::IOCTL_DEVICE_FEATURE,
    );
    whole!(facts: "vfio_group_status" = vfio::GroupStatus { argsz, flags });
    whole!(facts: "vfio_device_feature" = vfio::Feature { argsz, flags });
}

fn vfio_dma_buf(facts: &mut Facts) {
    values!(facts: "VFIO_DEVICE_FEATURE_DMA_BUF" = vfio::FEATURE_DMA_BUF);
    whole!(facts: "vfio_device_feature_dma_buf" = vfio::DmaBufHeader {
        region_index, open_flags, flags, nr_ranges,
    });
    whole!(facts: "vfio_region_dma_range" = vfio::DmaRange { offset, length });
}

/// The tail of `verbs_context`, and the structs of `ibverbs-sys` that the inline verbs and their callers
/// use: its bindings and the installed library may come from different releases of rdma-core.
fn libraries(facts: &mut Facts) {
    use ibverbs_sys::*;
    values!(facts:
        "struct BeforeContext" = size_of::<verbs::BeforeContext>(),
        "BeforeContext.sz" = offset_of!(verbs::BeforeContext, sz),
        "(uintptr_t)__VERBS_ABI_IS_EXTENDED" = verbs::VERBS_ABI_IS_EXTENDED,
        "struct ibv_context" = size_of::<ibv_context>(),
        "struct ibv_gid_entry" = size_of::<ibv_gid_entry>(),
        "struct ibv_wc" = size_of::<ibv_wc>(),
        "struct ibv_sge" = size_of::<ibv_sge>(),
        "struct ibv_send_wr" = size_of::<ibv_send_wr>(),
        "struct ibv_recv_wr" = size_of::<ibv_recv_wr>(),
    );
    fields!(facts: "ibv_context" = ibv_context { ops, cmd_fd, abi_compat });
    fields!(facts: "ibv_context_ops" = ibv_context_ops {
        poll_cq, req_notify_cq, post_send, post_recv,
    });
    fields!(facts: "ibv_qp" = ibv_qp { context });
    fields!(facts: "ibv_cq" = ibv_cq { context });
    fields!(facts: "ibv_pd" = ibv_pd { handle });
    fields!(facts: "ibv_port_attr" = ibv_port_attr { port_cap_flags2 });
}

fn connections(facts: &mut Facts) {
    use rdma_cm::*;
    values!(facts:
        "RDMA_CM_EVENT_ADDR_RESOLVED" = event::ADDR_RESOLVED,
        "RDMA_CM_EVENT_ADDR_ERROR" = event::ADDR_ERROR,
        "RDMA_CM_EVENT_ROUTE_RESOLVED" = event::ROUTE_RESOLVED,
        "RDMA_CM_EVENT_ROUTE_ERROR" = event::ROUTE_ERROR,
        "RDMA_CM_EVENT_CONNECT_REQUEST" = event::CONNECT_REQUEST,
        "RDMA_CM_EVENT_CONNECT_RESPONSE" = event::CONNECT_RESPONSE,
        "RDMA_CM_EVENT_CONNECT_ERROR" = event::CONNECT_ERROR,
        "RDMA_CM_EVENT_UNREACHABLE" = event::UNREACHABLE,
        "RDMA_CM_EVENT_REJECTED" = event::REJECTED,
        "RDMA_CM_EVENT_ESTABLISHED" = event::ESTABLISHED,
        "RDMA_CM_EVENT_DISCONNECTED" = event::DISCONNECTED,
        "RDMA_CM_EVENT_DEVICE_REMOVAL" = event::DEVICE_REMOVAL,
        "RDMA_CM_EVENT_ADDR_CHANGE" = event::ADDR_CHANGE,
        "RDMA_CM_EVENT_TIMEWAIT_EXIT" = event::TIMEWAIT_EXIT,
        "RDMA_PS_TCP" = RDMA_PS_TCP,
        "struct rdma_cm_id" = size_of::<rdma_cm_id>(),
        "struct rdma_cm_event" = size_of::<rdma_cm_event>(),
        "six objects begin at" = offset_of!(rdma_cm_id, objects),
    );
    whole!(facts: "rdma_event_channel" = rdma_event_channel { fd });
    whole!(facts: "rdma_ib_addr" = rdma_ib_addr { sgid, dgid, pkey });
    whole!(facts: "rdma_addr" = rdma_addr { src_storage, dst_storage, ibaddr });
    whole!(facts: "rdma_route" = rdma_route { addr, path_rec, num_paths });
    fields!(facts: "rdma_cm_id" = rdma_cm_id {
        verbs, channel, context, qp, route, ps, port_num, event, qp_type,
    });
    whole!(facts: "rdma_conn_param" = rdma_conn_param {
        private_data, private_data_len, responder_resources, initiator_depth, flow_control, retry_count,
        rnr_retry_count, srq, qp_num,
    });
    whole!(facts: "rdma_ud_param" = rdma_ud_param {
        private_data, private_data_len, ah_attr, qp_num, qkey,
    });
    fields!(facts: "rdma_cm_event" = rdma_cm_event { id, listen_id, event, status, param });
}

fn sync_file(facts: &mut Facts) {
    values!(facts:
        "DMA_BUF_IOCTL_EXPORT_SYNC_FILE" = dma_buf::IOCTL_EXPORT_SYNC_FILE,
        "DMA_BUF_IOCTL_IMPORT_SYNC_FILE" = dma_buf::IOCTL_IMPORT_SYNC_FILE,
    );
    whole!(facts: "dma_buf_export_sync_file" = dma_buf::ExportSyncFile { flags, fd });
    whole!(facts: "dma_buf_import_sync_file" = dma_buf::ImportSyncFile { flags, fd });
}

fn reg_mr_ex(facts: &mut Facts) {
    values!(facts:
        "IBV_REG_MR_MASK_IOVA" = symbols::IBV_REG_MR_MASK_IOVA,
        "IBV_REG_MR_MASK_ADDR" = symbols::IBV_REG_MR_MASK_ADDR,
        "IBV_REG_MR_MASK_FD" = symbols::IBV_REG_MR_MASK_FD,
        "IBV_REG_MR_MASK_FD_OFFSET" = symbols::IBV_REG_MR_MASK_FD_OFFSET,
        "IBV_REG_MR_MASK_DMAH" = symbols::IBV_REG_MR_MASK_DMAH,
        "IBV_DMAH_INIT_ATTR_MASK_CPU_ID" = symbols::IBV_DMAH_INIT_ATTR_MASK_CPU_ID,
        "IBV_DMAH_INIT_ATTR_MASK_PH" = symbols::IBV_DMAH_INIT_ATTR_MASK_PH,
        "IBV_DMAH_INIT_ATTR_MASK_TPH_MEM_TYPE" = symbols::IBV_DMAH_INIT_ATTR_MASK_TPH_MEM_TYPE,
        "IBV_TPH_MEM_TYPE_VM" = symbols::IBV_TPH_MEM_TYPE_VM,
        "IBV_TPH_MEM_TYPE_PM" = symbols::IBV_TPH_MEM_TYPE_PM,
    );
    // Before rdma-core 64 the struct lacks its last field, so its size is not compared here.
    fields!(facts: "ibv_mr_init_attr" = symbols::ibv_mr_init_attr {
        length, access, comp_mask, iova, addr, fd, fd_offset, dmah,
    });
    whole!(facts: "ibv_dmah" = symbols::ibv_dmah { context });
    whole!(facts: "ibv_dmah_init_attr" = symbols::ibv_dmah_init_attr {
        comp_mask, cpu_id, ph, tph_mem_type,
    });
}

fn buf(facts: &mut Facts) {
    values!(facts:
        "IBV_REG_MR_MASK_BUF" = symbols::IBV_REG_MR_MASK_BUF,
        "struct ibv_mr_init_attr" = size_of::<symbols::ibv_mr_init_attr>(),
    );
    fields!(facts: "ibv_mr_init_attr" = symbols::ibv_mr_init_attr { buf });
}

fn mlx5(facts: &mut Facts) {
    values!(facts:
        "MLX5DV_REG_DMABUF_ACCESS_DATA_DIRECT" = symbols::MLX5DV_REG_DMABUF_ACCESS_DATA_DIRECT,
    );
}

fn prototype_only(_: &mut Facts) {}

/// Runs a command and returns what it printed; its failure fails the test.
fn output(command: &mut Command) -> String {
    let output = command.output().expect("the C compiler starts");
    assert!(output.status.success(), "{command:?}:\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("headers and names are UTF-8")
}

#[test]
fn hand_written_layouts_agree_with_the_headers() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/layout.c");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("layout");
    let host = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let compiler =
        cc::Build::new().host(&host).target(&host).opt_level(0).warnings_into_errors(true).get_compiler();

    let headers = output(compiler.to_command().arg("-E").arg(&source));
    let mut ours = Facts::new();
    uverbs(&mut ours);
    dma_bufs(&mut ours);
    vfios(&mut ours);
    libraries(&mut ours);
    connections(&mut ours);
    exporters::v4l2(&mut ours);
    let mut compile = compiler.to_command();
    for newer in NEWER {
        if headers.contains(newer.text) {
            compile.arg(format!("-D{}", newer.have));
            (newer.add)(&mut ours);
        } else {
            // Not eprintln!: cargo would hide the line when the test passes.
            let _ = writeln!(
                std::io::stderr(),
                "layout: not compared, since the installed headers lack it: {} (needs {})",
                newer.text,
                newer.since
            );
        }
    }

    output(compile.arg(&source).arg("-o").arg(&program));
    let mut theirs = Facts::new();
    for line in output(&mut Command::new(&program)).lines() {
        let (name, value) = line.split_once('=').expect("name=value");
        let value = value.parse().expect("a number");
        let before = theirs.insert(name.to_owned(), value);
        assert_eq!(before, None, "{name} is printed twice");
    }

    let names = |facts: &Facts| facts.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&ours), names(&theirs), "names of this crate (left) and of the headers (right)");
    let wrong: Vec<_> = ours
        .iter()
        .filter(|(name, value)| theirs[*name] != **value)
        .map(|(name, value)| format!("{name}: {value} here, {} in the headers", theirs[name]))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
