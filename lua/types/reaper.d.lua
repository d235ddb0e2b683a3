---@meta _

-- Definitions of all that a script of cm4all-spawn-reaper can use, for lua-language-server and
-- other editors that read LuaCATS annotations. Nothing here is run. The manual is reaper.lua(5).
--
-- In a directory with a script, .luarc.json makes an editor use them:
--
--   {
--     "runtime.version": "LuaJIT",
--     "workspace.library": ["/DIRECTORY/OF/THIS/FILE"]
--   }
--
-- and the annotation of its handler makes it know the fields:
--
--   ---@param cgroup reaper.cgroup
--   function cgroup_released(cgroup)
--
-- "Suspends" means that the running handler is suspended until there is a result, while other
-- handlers go on. Below require, dofile, or a callback of string.gsub or table.sort, where Lua
-- cannot suspend anything, all of the script waits (and db:execute raises). The daemon, whose
-- process is another one, goes on in any case.
--
-- Every function raises an error for an argument of a wrong type, and for too many of them.

-- What the script defines

---Called for every released cgroup, in a coroutine of its own. What the script assigned to this
---name when its main chunk has ended is what is called; a later assignment changes nothing.
---
---If the script's process ends before the handler has ended, it begins again in the next one, with
---the same id: what it does should be repeatable.
---
---When it ends, the object and all objects got from it become stale: touching them raises
---"Stale object".
---@param cgroup reaper.cgroup
function cgroup_released(cgroup) end

---Called for SIGHUP, in a coroutine of its own; once more after it has ended, if a signal came
---while it was running. Optional; it is looked up each time, so it may be assigned later. Not called
---with the setting reload = "script": then the file is loaded again, in another process.
function reload() end

-- cgroup

---Counters, which only grow while a cgroup lives. Each is nil where the kernel has no number.
---@class reaper.counters
---@field cpu_total? number CPU time in seconds
---@field cpu_user? number seconds of it in user space
---@field cpu_system? number seconds of it in the kernel
---@field cpu_throttled? number seconds for which cpu.max held it up; of the cgroup alone
---@field cpu_throttled_periods? integer periods in which that happened; of the cgroup alone
---@field memory_events_high? integer how often it was throttled at memory.high
---@field memory_events_max? integer how often it was about to exceed memory.max
---@field memory_events_oom? integer how often an allocation was about to fail at the limit
---@field memory_events_oom_kill? integer processes that the OOM killer ended
---@field pids_forks? integer forks; no mainline kernel counts them
---@field pids_events_max? integer forks refused because of pids.max
---@field io_read_bytes? integer over all devices
---@field io_write_bytes? integer over all devices
---@field io_read_operations? integer over all devices
---@field io_write_operations? integer over all devices

---A cgroup above the released one. It is usually still alive: its numbers are read when they are
---asked for, and nil when it is gone, also if another one has got its name. Read-only.
---
---Numbers are those of the kernel: they include what the cgroup's children used, also of those that
---are deleted. Only reaper.cgroup.own may be added up over cgroups.
---@class reaper.parent: reaper.counters
---@field path string as in /proc/self/cgroup; any byte but NUL and newline
---@field btime? integer when it was made, in seconds since the epoch; nil if unknown
---@field age? number seconds since then; nil where btime is
---@field xattr reaper.xattr extended attributes
---@field parent? reaper.parent the cgroup above it; nil at the top
---@field memory_peak? integer most memory at any time, in bytes; Linux 5.19 or newer
---@field memory_swap_peak? integer most swap space at any time, in bytes; Linux 6.5 or newer
---@field pids_peak? integer most processes at any time; Linux 6.1 or newer
---@field cpu_pressure? number seconds in which some process waited for the CPU
---@field memory_pressure? number seconds in which some process waited for memory
---@field io_pressure? number seconds in which some process waited for I/O

---A released cgroup. Its numbers and attributes are those of the moment of the release.
---
---The three pressures are nil when the script was behind, after the first suspension, and when the
---call begins again, unless the setting "pressure" is on: then the cgroup is deleted.
---@class reaper.cgroup: reaper.parent
---@field id string unique for each call, the same when it begins again; plain ASCII
---@field own reaper.counters a new table of what was not reported before: may be added up
---@field attempt integer 1, and one more each time that it begins again
---@field remainder boolean CPU time used between an earlier call and the deletion

---Extended attributes. "account" reads user.account, a key with a dot is the whole name. nil for
---what is missing. Read-only, not to be iterated over.
---@class reaper.xattr
---@field [string] string?

-- Addresses

---An address to connect to; tostring() formats it. Looked up once, and for good.
---@class reaper.address

---Makes an address of "192.0.2.1", "192.0.2.1:80", "2001:db8::1", "[2001:db8::1]:80", "host",
---"host:80", "/path/of/a/socket" or "@abstract". Raises if that fails. Suspends for a host name, at
---most 10 seconds.
---@param address string the port is 5478 if none is given
---@return reaper.address
---@nodiscard
function control_resolve(address) end

-- Sockets

---@alias reaper.socket_type
---| '"stream"' # TCP, or a Unix stream socket; the default
---| '"dgram"' # UDP, or a Unix datagram socket
---| '"seqpacket"' # only Unix sockets

---@class reaper.socket_options
---@field type? reaper.socket_type

---@class reaper.socket_module
socket = {}

---Connects a socket. A host name's addresses are tried in turn. Suspends unless it is a datagram
---socket and the address is numeric, a path or abstract; at most 10 seconds for each address.
---@param address reaper.address|string a string needs a port, unless for a Unix socket
---@param options? reaper.socket_options e.g. `{type='dgram'}`
---@return reaper.socket? connection nil if it failed
---@return string? error
function socket:connect(address, options) end

---A connected socket. It is closed when it is collected.
---@class reaper.socket
local socket_object = {}

---Sends all of a string, or the part that string.sub(data, first, last) would return. Suspends
---while the receiver is too slow, at most 10 seconds. Raises if a position is outside the string.
---
---After an error in the middle of a stream, nothing more can be sent in it.
---@param data string|number
---@param first? integer default 1
---@param last? integer default -1
---@return integer? sent number of bytes; nil if it failed
---@return string? error
function socket_object:send(data, first, last) end

---Closes it; may be called again.
function socket_object:close() end

-- Control protocol of beng-proxy

---@class reaper.control_client_module
control_client = {}

---Makes a client for a control server. Suspends for a host name, at most 10 seconds.
---@param address reaper.address|string the port is 5478 if none is given
---@return reaper.control_client? client nil if it failed
---@return string? error
function control_client:new(address) end

---@class reaper.control_client
local client_object = {}

---Begins a datagram.
---@return reaper.builder
---@nodiscard
function client_object:build() end

---Sends what was built, in one datagram; nobody answers. Suspends while the receiver is too slow,
---at most 10 seconds. If the network is unreachable, it connects anew and tries once more.
---@param builder reaper.builder
---@return true? sent nil if it failed
---@return string? error
function client_object:send(builder) end

---A datagram that is being built. Each method adds one command for each of its arguments, and
---returns the builder: `client:build():fade_children("a", "b"):reset_limiter("c")`.
---@class reaper.builder
local builder_object = {}

---Cancels one job of Workshop.
---@param partition string
---@param job string
---@return self
function builder_object:cancel_job(partition, job) end

---@param id string
---@param ... string
---@return self
function builder_object:discard_session(id, ...) end

---@param account string
---@param ... string
---@return self
function builder_object:disconnect_database(account, ...) end

---Lets child processes with a tag finish what they do, and gives them nothing new.
---@param tag string
---@param ... string
---@return self
function builder_object:fade_children(tag, ...) end

---@param tag string
---@param ... string
---@return self
function builder_object:flush_filter_cache(tag, ...) end

---@param tag string
---@param ... string
---@return self
function builder_object:flush_http_cache(tag, ...) end

---Rejects a client's requests for some seconds. A number after an address is its seconds; an
---address without one goes out unchanged, for those who put the seconds in front of it themselves.
---@param address string
---@param ... string|number `reject_client("192.0.2.1", 60, "192.0.2.2", 60)`
---@return self
function builder_object:reject_client(address, ...) end

---@param account string
---@param ... string
---@return self
function builder_object:reset_limiter(account, ...) end

---Delays a client's requests for some seconds; arguments as for reject_client.
---@param address string
---@param ... string|number
---@return self
function builder_object:tarpit_client(address, ...) end

---Ends child processes with a tag at once.
---@param tag string
---@param ... string
---@return self
function builder_object:terminate_children(tag, ...) end

-- Cryptography. These are functions, without a colon. All strings may hold any byte. A key of a
-- wrong size raises.

---@class reaper.sodium
sodium = {}

---@param data string
---@return string digits lower case
---@nodiscard
function sodium.bin2hex(data) end

---@param digits string
---@return string? data nil for an odd number of digits, or other characters
---@nodiscard
function sodium.hex2bin(digits) end

---@param size integer 1 to 1048576
---@return string
---@nodiscard
function sodium.randombytes(size) end

---Makes keys for sealed boxes.
---@return string public_key 32 bytes
---@return string secret_key 32 bytes
---@nodiscard
function sodium.crypto_box_keypair() end

---Encrypts a message, so that only the owner of the secret key can read it.
---@param message string
---@param public_key string
---@return string sealed 48 bytes longer
---@nodiscard
function sodium.crypto_box_seal(message, public_key) end

---@param sealed string
---@param public_key string
---@param secret_key string
---@return string? message nil if it does not open
---@nodiscard
function sodium.crypto_box_seal_open(sealed, public_key, secret_key) end

---Computes the public key of a secret one.
---@param secret_key string 32 bytes
---@return string public_key 32 bytes
---@nodiscard
function sodium.crypto_scalarmult_base(secret_key) end

---Makes keys for signatures.
---@return string public_key 32 bytes
---@return string secret_key 64 bytes
---@nodiscard
function sodium.crypto_sign_keypair() end

---@param message string
---@param secret_key string
---@return string signature 64 bytes
---@nodiscard
function sodium.crypto_sign_detached(message, secret_key) end

---@param signature string
---@param message string
---@param public_key string
---@return boolean valid
---@nodiscard
function sodium.crypto_sign_verify_detached(signature, message, public_key) end

-- PostgreSQL

---@class reaper.pg_module
pg = {}

---Makes a connection. It connects in the background, and again whenever it is lost; failures are
---logged. Raises if the connection string makes no sense.
---@param conninfo string as for libpq, e.g. "host=db dbname=accounting"
---@param schema? string SET SCHEMA after each connect
---@return reaper.connection
---@nodiscard
function pg:new(conninfo, schema) end

---Returns a PostgreSQL array of the elements: `{"foo","b\"ar"}`.
---@param elements (string|number|boolean)[]
---@return string
---@nodiscard
function pg:encode_array(elements) end

---Returns the elements of a one-dimensional PostgreSQL array. Raises for any other text. An
---unquoted NULL gives the string "NULL".
---@param array string
---@return string[]
---@nodiscard
function pg:decode_array(array) end

---A connection to PostgreSQL.
---@class reaper.connection
local connection_object = {}

---What db:execute takes for $1, $2, ...: an array. true is "1", false is "0", nil is NULL.
---@class reaper.parameters
---@field n? integer how many there are; needed when the last one is nil
---@field [integer] string|number|boolean|nil

---Runs one statement. Suspends until there is a result, also while the database is away. Queries of
---a connection run one after the other, in order. Raises where it cannot suspend, and for a
---parameter of another type.
---
---A transaction over several calls belongs to the handler that began it; it is rolled back if the
---handler ends or parks without ending it.
---
---If the connection is lost during the query, the result is nil and an error, and nobody knows
---whether it was carried out: write statements so that they can be repeated.
---@param sql string one statement, with $1, $2, ... for parameters
---@param parameters? reaper.parameters
---@return reaper.result? result nil if it failed
---@return string? error PostgreSQL's message
function connection_object:execute(sql, parameters) end

---Has a function called, in a coroutine of its own, after each NOTIFY of a name; once more after it
---has ended, if others came meanwhile. Also after a lost connection was made again, since nobody
---knows what was missed. Raises if the name is listened to already. The connection is never
---collected then.
---@param name string 1 to 63 bytes; an identifier as it is, upper and lower case differ
---@param callback fun()
function connection_object:listen(name, callback) end

---The rows that a statement returned.
---@class reaper.result
local result_object = {}

---@alias reaper.fetch_mode
---| '"n"' # by number: row[1], row[2], ...; the default
---| '"a"' # by name: row.id, row.name, ...

---Returns the next row. Values are strings, NULL is nil.
---@param row? table is filled, and returned; a new one if it is missing
---@param mode? reaper.fetch_mode
---@return table<integer|string, string>? row nil after the last one
function result_object:fetch(row, mode) end

---Gives up the rows that were not fetched. Fetching after that raises.
function result_object:close() end
