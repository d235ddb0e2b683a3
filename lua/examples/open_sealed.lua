-- Opens the records that sealed.lua wrote. Not a script for the daemon: run it by hand.
--
--   cm4all-spawn-reaper --check --lua open_sealed.lua
--       makes a pair of keys and prints it
--   SECRET_KEY=$(cat secret) cm4all-spawn-reaper --check --lua open_sealed.lua < records
--       prints the records, one JSON object in each line
--
-- A line that does not open (torn, of another key, or changed on the way) is reported and left out.
-- One run may take 5 s of CPU time, and a minute altogether; "cpu" and "time" in the section
-- [handlers] of a file for --config allow more.

local secret_key = os.getenv("SECRET_KEY")

if not secret_key then
  local public, secret = sodium.crypto_box_keypair()
  print("PUBLIC_KEY=" .. sodium.bin2hex(public))
  print("SECRET_KEY=" .. sodium.bin2hex(secret))
  return
end

local secret = sodium.hex2bin(secret_key)
if not secret or #secret ~= 32 then
  error("SECRET_KEY must be 64 hexadecimal digits")
end
local public = sodium.crypto_scalarmult_base(secret)

local number = 0
for line in io.lines() do
  number = number + 1
  local sealed = sodium.hex2bin(line)
  local record = sealed and sodium.crypto_box_seal_open(sealed, public, secret)
  if record then
    print(record)
  else
    io.stderr:write("line " .. number .. " does not open\n")
  end
end
